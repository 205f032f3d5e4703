// `cinnabar up`: a whole cluster on this machine, in the foreground.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "cli/commands.h"
#include "cli/http_client.h"
#include "cli/supervisor.h"
#include "cli/terminal.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "common/gguf/gguf.h"
#include "common/keys/pepper.h"
#include "common/program/program.h"
#include "common/redis/client.h"
#include "kernels/device_name.h"

namespace cinnabar {
namespace {

namespace fs = std::filesystem;

// Gateways first: replies under way end while workers still run. Redis last: everybody writes to
// it.
enum StopOrder : int32_t { kStopGateway, kStopWorkers, kStopScheduler, kStopRedis };

struct Flags {
  std::vector<std::string> models;
  std::string device = "cpu";
  std::string devices;
  int32_t workers = 1;
  int32_t threads = 0;
  std::string listen = "127.0.0.1:8080";
  std::string grpc_listen = "127.0.0.1:8081";
  int32_t metrics_port = 9460;
  std::string data;
  std::string redis;
  std::string fsync = "always";
  bool keys = false;
  std::string log_level = "info";
  std::vector<std::string> gateway_flags, scheduler_flags, worker_flags;

  void Register(FlagSet& set) {
    set.Section("Models and workers");
    set.Add("model", &models, "[NAME=]DIR|FILE.gguf",
            "a Hugging Face folder or a GGUF file; repeatable [models/cinnabar-py-4m]");
    set.Add("workers", &workers, "N", "for each model");
    set.Add("threads", &threads, "N", "of a worker; 0 shares the cores out");
    set.Add("device", &device, "DEVICE",
            "of every worker: cpu, cuda, cuda:N; null makes tokens up: for load tests only");
    set.Add("devices", &devices, "N,N",
            "CUDA devices, and one worker for each model on each of them: 0,1");
    set.Section("Addresses");
    set.Add("listen", &listen, "HOST:PORT", "HTTP: the API and the gateway's /metrics");
    set.Add("grpc-listen", &grpc_listen, "HOST:PORT", "gRPC; empty: none");
    set.Add("metrics-port", &metrics_port, "PORT",
            "of the scheduler's metrics; the workers take the next ones");
    set.Add("keys", &keys,
            "ask for API keys, as an address beyond this machine must; their pepper is in --data");
    set.Section("Data");
    set.Add("data", &data, "DIR", "what outlives a restart [~/.local/state/cinnabar]");
    set.Add("redis", &redis, "HOST:PORT",
            "a Redis 7 that runs already [one of its own, in --data]");
    set.Add("fsync", &fsync, "always|everysec",
            "everysec is faster; a power cut may lose accepted requests of the last second");
    set.Section("Operation");
    set.Add("log-level", &log_level, "LEVEL", "debug, info, warn or error");
    set.Add("gateway-flag", &gateway_flags, "FLAG", "handed to cinnabar-gateway; repeatable");
    set.Add("scheduler-flag", &scheduler_flags, "FLAG", "handed to cinnabar-scheduler; repeatable");
    set.Add("worker-flag", &worker_flags, "FLAG", "handed to every cinnabar-worker; repeatable");
    set.Examples(
        "examples:\n"
        "  cinnabar up\n"
        "  cinnabar up --model coder=/models/sdar-1.7b --workers 2 --worker-flag=--dtype=bfloat16\n"
        "  cinnabar up --listen 127.0.0.1:9000 --data /var/lib/cinnabar --log-level warn\n");
  }
};

struct ServedModel {
  std::string name;
  std::string path;
};

fs::path ProgramFolder() {
  std::error_code error;
  const fs::path self = fs::read_symlink("/proc/self/exe", error);
  return error ? fs::path(".") : self.parent_path();
}

// The model that ships: beside the sources of a build tree, or in the folder of an installation.
absl::StatusOr<std::string> DefaultModel() {
  const fs::path bin = ProgramFolder();
  for (const fs::path& root : {fs::path("."), bin / "..", bin / "../../.."}) {
    const fs::path model = root / "models/cinnabar-py-4m";
    std::error_code error;
    if (fs::exists(model / "config.json", error)) return fs::canonical(model).string();
  }
  return absl::NotFoundError(
      "there is no models/cinnabar-py-4m here: name a folder with --model DIR");
}

absl::StatusOr<std::vector<ServedModel>> ReadModels(const Flags& flags) {
  std::vector<std::string> texts = flags.models;
  if (texts.empty()) {
    CINNABAR_ASSIGN_OR_RETURN(std::string model, DefaultModel());
    texts.push_back(std::move(model));
  }
  std::vector<ServedModel> models;
  for (const std::string& text : texts) {
    const size_t equal = text.find('=');
    ServedModel model;
    if (equal != std::string::npos) model.name = text.substr(0, equal);
    model.path = equal == std::string::npos ? text : text.substr(equal + 1);
    while (model.path.size() > 1 && model.path.back() == '/') model.path.pop_back();
    if (model.name.empty()) model.name = model.path.substr(model.path.rfind('/') + 1);
    std::error_code error;
    if (HasGgufEnding(model.path) ? !fs::is_regular_file(model.path, error)
                                  : !fs::exists(fs::path(model.path) / "config.json", error)) {
      return absl::NotFoundError(
          absl::StrCat("--model ", text, ": ", model.path,
                       " holds no config.json; name a Hugging Face folder or a GGUF file"));
    }
    models.push_back(std::move(model));
  }
  return models;
}

absl::StatusOr<std::string> DataFolder(const Flags& flags) {
  std::string folder = flags.data;
  if (folder.empty()) {
    const char* state = std::getenv("XDG_STATE_HOME");
    const char* home = std::getenv("HOME");
    if (state != nullptr && state[0] == '/') {
      folder = absl::StrCat(state, "/cinnabar");
    } else if (home != nullptr && home[0] == '/') {
      folder = absl::StrCat(home, "/.local/state/cinnabar");
    } else {
      return absl::InvalidArgumentError("--data is missing, and there is no HOME to put it in");
    }
  }
  std::error_code error;
  fs::create_directories(fs::path(folder) / "redis", error);
  if (error) {
    return absl::FailedPreconditionError(absl::StrCat("--data ", folder, ": ", error.message()));
  }
  fs::permissions(folder, fs::perms::owner_all, error);  // prompts are in there
  folder = fs::canonical(folder, error).string();
  constexpr size_t kSocketPathMax = 100;
  if (folder.size() + sizeof("/redis.sock") > kSocketPathMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("--data ", folder, ": too long for a socket's path; take a shorter one"));
  }
  return folder;
}

// Held while this process lives, so that two clusters never share a folder.
absl::Status LockFolder(const std::string& folder) {
  const int fd = open((folder + "/lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) != 0) {
    if (fd >= 0) close(fd);
    return absl::FailedPreconditionError(absl::StrCat(
        folder, " belongs to a cluster that is up; stop it, or take another folder with --data"));
  }
  return absl::OkStatus();
}

// The one beside this program (a bundle's), else the machine's.
absl::StatusOr<std::string> FindRedisServer() {
  std::string beside = (ProgramFolder() / "redis-server").string();
  if (access(beside.c_str(), X_OK) == 0) return beside;
  const char* path = std::getenv("PATH");
  for (const absl::string_view folder : absl::StrSplit(path == nullptr ? "/usr/bin" : path, ':')) {
    std::string program = absl::StrCat(folder, "/redis-server");
    if (access(program.c_str(), X_OK) == 0) return program;
  }
  return absl::NotFoundError(
      "redis-server is not installed: install Redis 7, or name one that runs with --redis "
      "HOST:PORT");
}

absl::StatusOr<ChildSpec> RedisChild(const std::string& folder, const std::string& fsync) {
  ChildSpec spec = {.name = "redis", .stop_order = kStopRedis, .notifies = false};
  CINNABAR_ASSIGN_OR_RETURN(const std::string program, FindRedisServer());
  const std::string config = folder + "/redis.conf";
  std::ofstream out(config);
  // Nothing is ever evicted: full is an answer to the client (503), a lost request is not. No
  // snapshots beside the log: it alone is read at the start.
  out << "port 0\nunixsocket \"" << folder << "/redis.sock\"\nunixsocketperm 700\ndir \"" << folder
      << "/redis\"\nappendonly yes\nappendfsync " << fsync
      << "\nsave \"\"\nmaxmemory-policy noeviction\nloglevel warning\ndaemonize no\n";
  out.close();
  if (!out) return absl::FailedPreconditionError(absl::StrCat("cannot write ", config));
  spec.args = {program, config};
  return spec;
}

// What --device of each worker of a model is.
absl::StatusOr<std::vector<std::string>> WorkerDevices(const Flags& flags, const FlagSet& set) {
  if (flags.devices.empty()) {
    if (flags.device != "null") {
      CINNABAR_RETURN_IF_ERROR(ParseDeviceName(flags.device).status(), "--device");
    }
    return std::vector<std::string>(flags.workers, flags.device);
  }
  if (set.Has("device") || set.Has("workers")) {
    return absl::InvalidArgumentError(
        "--devices says how many workers there are and where: leave --device and --workers out");
  }
  std::vector<std::string> devices;
  for (const absl::string_view index : absl::StrSplit(flags.devices, ',')) {
    const std::string name = absl::StrCat("cuda:", index);
    const absl::StatusOr<DeviceName> device = ParseDeviceName(name);
    if (!device.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--devices ", flags.devices, ": write it as 0,1"));
    }
    if (std::count(devices.begin(), devices.end(), name) > 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--devices ", flags.devices, ": ", index, " is there twice"));
    }
    devices.push_back(name);
  }
  return devices;
}

absl::Status Validate(const Flags& flags) {
  if (flags.workers < 1 || flags.workers > 64) {
    return absl::InvalidArgumentError(
        absl::StrCat("--workers ", flags.workers, ": take 1 to 64 on one machine"));
  }
  if (flags.fsync != "always" && flags.fsync != "everysec") {
    return absl::InvalidArgumentError(
        absl::StrCat("--fsync ", flags.fsync, ": take always or everysec"));
  }
  if (flags.metrics_port < 0 || flags.metrics_port > 65000) {
    return absl::InvalidArgumentError(absl::StrCat("--metrics-port ", flags.metrics_port,
                                                   ": take 1 to 65000, or 0 for free ones"));
  }
  if (!flags.redis.empty()) {
    CINNABAR_RETURN_IF_ERROR(ParseRedisAddress(flags.redis).status(), "--redis");
  }
  return absl::OkStatus();
}

void Append(std::vector<std::string>& to, const std::vector<std::string>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

std::string PepperPath(const std::string& folder) { return folder + "/pepper"; }

std::vector<ChildSpec> ClusterChildren(const Flags& flags, const std::vector<ServedModel>& models,
                                       const std::vector<std::string>& devices,
                                       const std::string& folder, const std::string& redis) {
  const std::string bin = ProgramFolder().string();
  int32_t next_port = flags.metrics_port;
  const auto program = [&](const std::string& binary, const std::string& name, StopOrder order) {
    ChildSpec spec = {.name = name, .args = {}, .stop_order = order};
    spec.args = {bin + "/" + binary, "--redis",      redis, "--name", name,
                 "--log-level",      flags.log_level};
    return spec;
  };
  const auto metrics = [&](ChildSpec& spec) {
    Append(spec.args, {"--metrics-listen", absl::StrCat("127.0.0.1:", next_port)});
    if (next_port != 0) ++next_port;
  };
  std::vector<ChildSpec> children;
  ChildSpec scheduler = program("cinnabar-scheduler", "scheduler", kStopScheduler);
  metrics(scheduler);
  Append(scheduler.args, flags.scheduler_flags);
  children.push_back(std::move(scheduler));

  const auto num_workers = static_cast<int32_t>(models.size() * devices.size());
  const auto cores = static_cast<int32_t>(std::thread::hardware_concurrency());
  const int32_t threads = flags.threads > 0 ? flags.threads : std::max(1, cores / num_workers);
  for (int32_t i = 0; i < num_workers; ++i) {
    const ServedModel& model = models[i / devices.size()];
    ChildSpec worker = program("cinnabar-worker", absl::StrCat("worker-", i), kStopWorkers);
    metrics(worker);
    Append(worker.args, {"--model", model.path, "--model-name", model.name, "--device",
                         devices[i % devices.size()], "--threads", absl::StrCat(threads)});
    Append(worker.args, flags.worker_flags);
    children.push_back(std::move(worker));
  }
  ChildSpec gateway = program("cinnabar-gateway", "gateway", kStopGateway);
  Append(gateway.args, {"--listen", flags.listen, "--grpc-listen", flags.grpc_listen});
  for (const ServedModel& model : models) {
    Append(gateway.args, {"--model", absl::StrCat(model.name, "=", model.path)});
  }
  if (flags.keys) Append(gateway.args, {"--keys-pepper", PepperPath(folder)});
  Append(gateway.args, flags.gateway_flags);
  children.push_back(std::move(gateway));
  return children;
}

// Prints the children's lines behind their names, each name in a colour of its own.
class LinePrinter {
 public:
  explicit LinePrinter(bool colour) : colour_(colour) {}

  void Print(absl::string_view name, absl::string_view line) {
    static constexpr const char* kColours[] = {"\033[36m", "\033[35m", "\033[33m",
                                               "\033[34m", "\033[32m", "\033[31m"};
    size_t i = 0;
    while (i < names_.size() && names_[i] != name) ++i;
    if (i == names_.size()) names_.emplace_back(name);
    std::string column = absl::StrFormat("%-10s", name);
    if (colour_) column = absl::StrCat(kColours[i % std::size(kColours)], column, ansi::kReset);
    std::fprintf(stdout, "%s | %s\n", column.c_str(), Printable(line).c_str());
    std::fflush(stdout);
  }

 private:
  bool colour_;
  std::vector<std::string> names_;
};

bool RedisAnswers(const std::string& redis) {
  const absl::StatusOr<RedisAddress> address = ParseRedisAddress(redis);
  if (!address.ok()) return false;
  RedisClient client({.address = *address, .retry = {.attempts_max = 1}});
  return client.Connect().ok();
}

bool GatewayAnswers(const std::string& listen) {
  const absl::StatusOr<HttpUrl> url = ParseHttpUrl("http://" + listen);
  if (!url.ok()) return false;
  absl::StatusOr<std::unique_ptr<HttpClient>> client = HttpClient::Make(*url);
  if (!client.ok()) return false;
  const absl::StatusOr<HttpReply> reply = (*client)->Fetch({.target = "/readyz"}, absl::Seconds(2));
  return reply.ok() && reply->head.status == 200;
}

void PrintSummary(const Flags& flags, const std::vector<ServedModel>& models, size_t num_workers,
                  const std::string& folder, const std::string& redis, absl::Duration took) {
  const std::string url = "http://" + flags.listen;
  const std::string names = absl::StrJoin(
      models, ", ",
      [](std::string* out, const ServedModel& model) { absl::StrAppend(out, model.name); });
  std::printf("\nCinnabar is up after %.1f s, and serves %s %s.\n\n", absl::ToDoubleSeconds(took),
              names.c_str(), flags.keys ? "to who has a key" : "to this machine");
  std::printf("  HTTP     %s/v1 (OpenAI-compatible)\n", url.c_str());
  if (!flags.grpc_listen.empty()) std::printf("  gRPC     %s\n", flags.grpc_listen.c_str());
  std::printf("  metrics  %s/metrics", url.c_str());
  if (flags.metrics_port != 0) {
    const int32_t last = flags.metrics_port + static_cast<int32_t>(num_workers);
    std::printf(", 127.0.0.1:%d (scheduler), :%d%s (workers)", flags.metrics_port,
                flags.metrics_port + 1,
                last > flags.metrics_port + 1 ? absl::StrCat(" to :", last).c_str() : "");
  }
  std::printf("\n  queue    %s", redis.c_str());
  if (flags.redis.empty())
    std::printf(", kept in %s (fsync %s)", folder.c_str(), flags.fsync.c_str());
  std::printf("\n\nTry, in another terminal:\n");
  if (flags.keys) {
    std::printf(
        "  export CINNABAR_API_KEY=$(cinnabar keys create --pepper %s --tenant me --redis %s)\n",
        PepperPath(folder).c_str(), redis.c_str());
  }
  std::printf(
      "  curl -s %s/v1/completions %s-d '{\"model\": \"%s\", \"prompt\": \"def add(a, b):\\n    "
      "return a\", \"max_tokens\": 8}'\n"
      "  cinnabar generate --url %s --prompt 'def add(a, b):' --gen-length 24 --watch\n"
      "  cinnabar top --redis %s\n\n"
      "Ctrl-C stops it. What is queued by then is served after the next start.\n\n",
      url.c_str(), flags.keys ? "-H \"Authorization: Bearer $CINNABAR_API_KEY\" " : "",
      models[0].name.c_str(), url.c_str(), redis.c_str());
  std::fflush(stdout);
}

absl::Status Up(const Flags& flags, const FlagSet& set) {
  const absl::Time begin = absl::Now();
  CINNABAR_RETURN_IF_ERROR(Validate(flags));
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<std::string> devices, WorkerDevices(flags, set));
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<ServedModel> models, ReadModels(flags));
  CINNABAR_ASSIGN_OR_RETURN(const std::string folder, DataFolder(flags));
  CINNABAR_RETURN_IF_ERROR(LockFolder(folder));
  if (flags.keys) CINNABAR_RETURN_IF_ERROR(LoadOrCreatePepper(PepperPath(folder)).status());

  const bool colour = WantsColour(STDOUT_FILENO);
  LinePrinter printer(colour);
  SupervisorOptions options;
  options.on_line = [&](absl::string_view name, absl::string_view line) {
    printer.Print(name, line);
  };
  options.on_event = [&](absl::string_view name, absl::string_view what) {
    printer.Print("up", absl::StrCat(name, " ", what));
  };
  CINNABAR_ASSIGN_OR_RETURN(const std::unique_ptr<Supervisor> supervisor,
                            Supervisor::Make(std::move(options)));
  std::string redis = flags.redis;
  const auto run = [&]() -> absl::Status {
    if (redis.empty()) {
      redis = folder + "/redis.sock";
      CINNABAR_ASSIGN_OR_RETURN(ChildSpec spec, RedisChild(folder, flags.fsync));
      CINNABAR_RETURN_IF_ERROR(supervisor->Start(std::move(spec)));
    }
    printer.Print("up", absl::StrCat("waits for Redis at ", redis));
    CINNABAR_RETURN_IF_ERROR(supervisor->RunUntil([&] { return RedisAnswers(redis); }));
    if (supervisor->stopping()) return absl::OkStatus();
    for (ChildSpec& spec : ClusterChildren(flags, models, devices, folder, redis)) {
      CINNABAR_RETURN_IF_ERROR(supervisor->Start(std::move(spec)));
    }
    CINNABAR_RETURN_IF_ERROR(supervisor->RunUntil(
        [&] { return supervisor->AllReady() && GatewayAnswers(flags.listen); }));
    if (supervisor->stopping()) return absl::OkStatus();
    PrintSummary(flags, models, models.size() * devices.size(), folder, redis, absl::Now() - begin);
    NotifyReady();
    return supervisor->RunUntil([] { return false; });
  };
  const absl::Status status = run();
  printer.Print("up", "stops: the gateway first, Redis last; Ctrl-C again ends all at once");
  NotifyStopping();
  const bool clean = supervisor->Stop();
  if (!status.ok()) return status;
  printer.Print("up", clean ? "stopped" : "stopped; some had to be killed");
  return absl::OkStatus();
}

}  // namespace

int RunUp(const std::vector<std::string>& args) {
  Flags flags;
  FlagSet set("cinnabar up [flags]",
              "A whole cluster on this machine, in the foreground: Redis, scheduler, workers and "
              "gateway. Programs that\nend are started again; Ctrl-C stops all of them in order.");
  flags.Register(set);
  return RunCommand("up", set, args, [&]() -> absl::Status {
    CINNABAR_RETURN_IF_ERROR(TakesNoText(set, "--help lists them"));
    return Up(flags, set);
  });
}

}  // namespace cinnabar
