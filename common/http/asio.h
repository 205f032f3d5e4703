// Asio and its coroutines, as we use them. Include this instead of the single headers:
// awaitable.hpp of Boost 1.74 uses std::exchange without including <utility>.
#ifndef CINNABAR_COMMON_HTTP_ASIO_H_
#define CINNABAR_COMMON_HTTP_ASIO_H_

// clang-format off
#include <utility>
// clang-format on
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/async_result.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>

namespace cinnabar {
namespace asio = boost::asio;
}  // namespace cinnabar

#endif  // CINNABAR_COMMON_HTTP_ASIO_H_
