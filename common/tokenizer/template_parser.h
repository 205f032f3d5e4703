// The syntax of chat templates: text to a tree. Private to this folder.
#ifndef CINNABAR_COMMON_TOKENIZER_TEMPLATE_PARSER_H_
#define CINNABAR_COMMON_TOKENIZER_TEMPLATE_PARSER_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/tokenizer/template_value.h"

namespace cinnabar::chat {

enum class NodeKind {
  // Expressions: what `children` holds.
  kConstant,     // none; `constant`
  kName,         // none; `name`
  kAttribute,    // object; `name`
  kItem,         // object, key
  kSlice,        // object, start, stop, step; the last three may be null
  kCall,         // callee, then arguments; `named`
  kFilter,       // value (null in a filter block), then arguments; `name`, `named`
  kTest,         // value, then arguments; `name`, `named`
  kNegate,       // value
  kPlus,         // value
  kNot,          // value
  kAnd,          // left, right
  kOr,           // left, right
  kArithmetic,   // left, right; `name` is + - * / // % **
  kConcat,       // the parts of ~
  kCompare,      // the operands; `operators` between them
  kConditional,  // then, condition, else (may be null)
  kList,         // items
  kTuple,        // items
  kDict,         // key, value, key, value ...
  // Statements.
  kText,         // none; `constant`
  kOutput,       // value
  kIf,           // conditions; bodies: one each, then that of else if there is one
  kFor,          // target, iterable, filter (may be null); bodies: loop, else
  kSet,          // target, value
  kSetBlock,     // target, filter (may be null); bodies: one
  kMacro,        // defaults of the last parameters; `name`, `parameters`; bodies: one
  kFilterBlock,  // filter; bodies: one
  kBody,         // none; bodies: one
  kBreak,
  kContinue,
};

struct Node;
using NodePtr = std::unique_ptr<const Node>;

struct Node {
  NodeKind kind = NodeKind::kText;
  int line = 0;
  std::string name;
  Value constant;
  std::vector<NodePtr> children;
  std::vector<std::pair<std::string, NodePtr>> named;
  std::vector<std::string> operators;
  std::vector<std::string> parameters;
  std::vector<std::vector<NodePtr>> bodies;
  int depth = 1;
};

// Whitespace as transformers sets Jinja up: trim_blocks and lstrip_blocks on, the template's last
// newline dropped. InvalidArgument with the line for what is not a template; Unimplemented for the
// tags this subset lacks (block, call, do, extends, from, import, include, with, autoescape,
// trans).
absl::StatusOr<std::vector<NodePtr>> ParseTemplate(absl::string_view source);

}  // namespace cinnabar::chat

#endif  // CINNABAR_COMMON_TOKENIZER_TEMPLATE_PARSER_H_
