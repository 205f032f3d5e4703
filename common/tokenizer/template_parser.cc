#include "common/tokenizer/template_parser.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdint>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "common/tokenizer/utf8.h"

namespace cinnabar::chat {
namespace {

constexpr size_t kSourceBytesMax = 1 << 20;
constexpr int kParserDepthMax = 60;  // of the parser's own recursion; each level is several calls
constexpr int kNodeDepthMax = 250;   // of the tree

bool IsSpace(char c) { return absl::string_view(" \t\n\r\f\v").find(c) != absl::string_view::npos; }
bool IsNameByte(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' ||
         static_cast<unsigned char>(c) >= 0x80;
}
bool IsDigit(char c) { return c >= '0' && c <= '9'; }

absl::Status At(int line, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("chat template line ", line, ": ", what));
}

// ---- lexer
// ----------------------------------------------------------------------------------------

enum class TokenKind {
  kText,
  kBlockBegin,
  kBlockEnd,
  kVariableBegin,
  kVariableEnd,
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd
};

struct Token {
  TokenKind kind = TokenKind::kEnd;
  std::string text;
  int line = 0;
};

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}
  absl::StatusOr<std::vector<Token>> Run();

 private:
  bool Sees(absl::string_view text) const {
    return absl::StartsWith(absl::string_view(source_).substr(at_), text);
  }
  void Advance(size_t to) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(at_),
                                         source_.begin() + static_cast<ptrdiff_t>(to), '\n'));
    at_ = to;
  }
  void SkipSpace() {
    size_t to = at_;
    while (to < source_.size() && IsSpace(source_[to])) ++to;
    Advance(to);
  }
  void Put(TokenKind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }
  void PutText(size_t begin, size_t end, char sign, bool is_variable);
  void FinishTag(char sign, bool trims_newline);
  bool TryRaw();
  absl::Status LexTag(bool is_variable);
  absl::Status LexString();
  void LexNumber();

  std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // nothing but a newline stands before at_ on its line
  std::vector<Token> tokens_;
};

// The text before a tag, less what the tag's sign or lstrip_blocks takes from its end.
void Lexer::PutText(size_t begin, size_t end, char sign, bool is_variable) {
  const size_t text_end = end;
  if (sign == '-') {
    while (end > begin && IsSpace(source_[end - 1])) --end;
  } else if (sign != '+' && !is_variable) {
    size_t line_begin = end;
    while (line_begin > begin && source_[line_begin - 1] != '\n') --line_begin;
    if ((line_begin > begin || line_starting_) &&
        std::all_of(source_.begin() + static_cast<ptrdiff_t>(line_begin),
                    source_.begin() + static_cast<ptrdiff_t>(end), IsSpace)) {
      end = line_begin;
    }
  }
  if (end > begin) Put(TokenKind::kText, source_.substr(begin, end - begin));
  Advance(text_end);
}

// After a tag's closing delimiter.
void Lexer::FinishTag(char sign, bool trims_newline) {
  const size_t begin = at_;
  if (sign == '-') {
    SkipSpace();
  } else if (sign != '+' && trims_newline && at_ < source_.size() && source_[at_] == '\n') {
    Advance(at_ + 1);
  }
  line_starting_ = at_ > begin && source_[at_ - 1] == '\n';
}

// At "{%": consumes a whole raw section if one begins here (after its sign).
bool Lexer::TryRaw() {
  size_t to = at_;
  while (to < source_.size() && IsSpace(source_[to])) ++to;
  if (source_.compare(to, 3, "raw") != 0) return false;
  to += 3;
  while (to < source_.size() && IsSpace(source_[to])) ++to;
  const bool strips = to < source_.size() && source_[to] == '-';
  if (strips) ++to;
  if (source_.compare(to, 2, "%}") != 0) return false;
  to += 2;
  // The end: the first {% endraw %} after it.
  for (size_t open = source_.find("{%", to); open != std::string::npos;
       open = source_.find("{%", open + 2)) {
    size_t in = open + 2;
    char sign = 0;
    if (in < source_.size() && (source_[in] == '-' || source_[in] == '+')) sign = source_[in++];
    while (in < source_.size() && IsSpace(source_[in])) ++in;
    if (source_.compare(in, 6, "endraw") != 0) continue;
    in += 6;
    while (in < source_.size() && IsSpace(source_[in])) ++in;
    char end_sign = 0;
    if (in < source_.size() && (source_[in] == '-' || source_[in] == '+')) end_sign = source_[in++];
    if (source_.compare(in, 2, "%}") != 0) continue;
    Advance(to);
    line_starting_ = false;
    if (strips) SkipSpace();
    PutText(std::min(at_, open), open, sign, false);
    Advance(in + 2);
    FinishTag(end_sign, true);
    return true;
  }
  return false;
}

absl::StatusOr<std::vector<Token>> Lexer::Run() {
  while (at_ < source_.size()) {
    size_t open = at_;
    while (true) {
      open = source_.find('{', open);
      if (open == std::string::npos || open + 1 >= source_.size()) {
        open = std::string::npos;
        break;
      }
      const char next = source_[open + 1];
      if (next == '{' || next == '%' || next == '#') break;
      ++open;
    }
    if (open == std::string::npos) {
      Put(TokenKind::kText, source_.substr(at_));
      Advance(source_.size());
      break;
    }
    const char kind = source_[open + 1];
    const char next = open + 2 < source_.size() ? source_[open + 2] : '\0';
    const char sign = next == '-' || next == '+' ? next : '\0';
    PutText(at_, open, sign, kind == '{');
    Advance(open + 2 + (sign != 0 ? 1 : 0));
    if (kind == '#') {
      const size_t close = source_.find("#}", at_);
      if (close == std::string::npos) return At(line_, "comment has no end");
      const char end_sign = close > at_ ? source_[close - 1] : '\0';
      Advance(close + 2);
      FinishTag(end_sign, true);
      continue;
    }
    if (kind == '%' && TryRaw()) continue;
    CINNABAR_RETURN_IF_ERROR(LexTag(kind == '{'));
  }
  Put(TokenKind::kEnd, "end of template");
  return std::move(tokens_);
}

absl::Status Lexer::LexTag(bool is_variable) {
  const int tag_line = line_;
  Put(is_variable ? TokenKind::kVariableBegin : TokenKind::kBlockBegin, is_variable ? "{{" : "{%");
  const absl::string_view close = is_variable ? "}}" : "%}";
  std::string open_brackets;  // inside brackets "}}" closes dicts, not the tag
  while (true) {
    SkipSpace();
    if (at_ >= source_.size()) return At(tag_line, absl::StrCat("tag has no ", close));
    if (open_brackets.empty()) {
      char sign = 0;
      if (Sees(absl::StrCat("-", close))) sign = '-';
      if (!is_variable && Sees(absl::StrCat("+", close))) sign = '+';
      if (sign != 0 || Sees(close)) {
        Put(is_variable ? TokenKind::kVariableEnd : TokenKind::kBlockEnd, std::string(close));
        Advance(at_ + close.size() + (sign != 0 ? 1 : 0));
        FinishTag(sign, !is_variable);
        return absl::OkStatus();
      }
    }
    const char c = source_[at_];
    if (IsDigit(c)) {
      LexNumber();
      continue;
    }
    if (IsNameByte(c)) {
      size_t to = at_;
      while (to < source_.size() && IsNameByte(source_[to])) ++to;
      Put(TokenKind::kName, source_.substr(at_, to - at_));
      Advance(to);
      continue;
    }
    if (c == '\'' || c == '"') {
      CINNABAR_RETURN_IF_ERROR(LexString());
      continue;
    }
    static constexpr absl::string_view kOperators[] = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[",
        "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",", ";"};
    const auto* found = std::find_if(std::begin(kOperators), std::end(kOperators),
                                     [&](absl::string_view op) { return Sees(op); });
    if (found == std::end(kOperators)) {
      return At(line_, absl::StrCat("unexpected character '", absl::string_view(&c, 1), "'"));
    }
    if (c == '(' || c == '[' || c == '{') open_brackets += c == '(' ? ')' : c == '[' ? ']' : '}';
    if (c == ')' || c == ']' || c == '}') {
      if (open_brackets.empty() || open_brackets.back() != c) {
        return At(line_, absl::StrCat("unexpected '", absl::string_view(&c, 1), "'"));
      }
      open_brackets.pop_back();
    }
    Put(TokenKind::kOperator, std::string(*found));
    Advance(at_ + found->size());
  }
}

void Lexer::LexNumber() {
  size_t to = at_;
  const auto digits = [&] {
    while (to < source_.size() &&
           (IsDigit(source_[to]) ||
            (source_[to] == '_' && to + 1 < source_.size() && IsDigit(source_[to + 1])))) {
      ++to;
    }
  };
  const bool after_dot = at_ > 0 && source_[at_ - 1] == '.';
  bool is_float = false;
  if (source_[at_] == '0' && at_ + 1 < source_.size() &&
      absl::string_view("xXoObB").find(source_[at_ + 1]) != absl::string_view::npos) {
    to += 2;
    while (to < source_.size() &&
           (std::isxdigit(static_cast<unsigned char>(source_[to])) != 0 || source_[to] == '_')) {
      ++to;
    }
  } else {
    digits();
    if (!after_dot && to + 1 < source_.size() && source_[to] == '.' && IsDigit(source_[to + 1])) {
      is_float = true;
      ++to;
      digits();
    }
    if (!after_dot && to < source_.size() && (source_[to] == 'e' || source_[to] == 'E')) {
      size_t exponent = to + 1;
      if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-')) {
        ++exponent;
      }
      if (exponent < source_.size() && IsDigit(source_[exponent])) {
        is_float = true;
        to = exponent;
        digits();
      }
    }
  }
  std::string text = source_.substr(at_, to - at_);
  text.erase(std::remove(text.begin(), text.end(), '_'), text.end());
  Put(is_float ? TokenKind::kFloat : TokenKind::kInteger, std::move(text));
  Advance(to);
}

// The escapes are Python's.
absl::Status Lexer::LexString() {
  const char quote = source_[at_];
  std::string text;
  size_t to = at_ + 1;
  while (true) {
    if (to >= source_.size()) return At(line_, "string has no end");
    const char c = source_[to++];
    if (c == quote) break;
    if (c != '\\') {
      text += c;
      continue;
    }
    if (to >= source_.size()) return At(line_, "string has no end");
    const char escaped = source_[to++];
    size_t num_hex = 0;
    switch (escaped) {
      case '\n':
        continue;
      case '\\':
      case '\'':
      case '"':
        text += escaped;
        continue;
      case 'n':
        text += '\n';
        continue;
      case 't':
        text += '\t';
        continue;
      case 'r':
        text += '\r';
        continue;
      case 'a':
        text += '\a';
        continue;
      case 'b':
        text += '\b';
        continue;
      case 'f':
        text += '\f';
        continue;
      case 'v':
        text += '\v';
        continue;
      case 'x':
        num_hex = 2;
        break;
      case 'u':
        num_hex = 4;
        break;
      case 'U':
        num_hex = 8;
        break;
      default:
        break;
    }
    if (num_hex > 0) {
      uint32_t point = 0;
      const char* first = source_.data() + to;
      const char* last = source_.data() + std::min(source_.size(), to + num_hex);
      const std::from_chars_result read = std::from_chars(first, last, point, 16);
      if (static_cast<size_t>(read.ptr - first) != num_hex || point > 0x10FFFF ||
          (point >= 0xD800 && point <= 0xDFFF)) {
        return At(line_, absl::StrCat("bad escape \\", absl::string_view(&escaped, 1)));
      }
      AppendUtf8(point, &text);
      to += num_hex;
    } else if (escaped >= '0' && escaped <= '7') {
      uint32_t point = static_cast<uint32_t>(escaped - '0');
      for (int i = 0; i < 2 && to < source_.size() && source_[to] >= '0' && source_[to] <= '7';
           ++i) {
        point = point * 8 + static_cast<uint32_t>(source_[to++] - '0');
      }
      AppendUtf8(point, &text);
    } else {
      text += '\\';
      text += escaped;
    }
  }
  Put(TokenKind::kString, std::move(text));
  Advance(to);
  return absl::OkStatus();
}

// ---- parser
// ---------------------------------------------------------------------------------------

using MutableNode = std::unique_ptr<Node>;
using Body = std::vector<NodePtr>;

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}
  absl::StatusOr<Body> Run();

 private:
  struct DepthGuard {
    explicit DepthGuard(int* depth) : depth_(depth) { ++*depth_; }
    ~DepthGuard() { --*depth_; }
    int* depth_;
  };
  const Token& Now() const { return tokens_[at_]; }
  const Token& Ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  void Next() {
    if (at_ + 1 < tokens_.size()) ++at_;
  }
  bool IsOp(absl::string_view op) const {
    return Now().kind == TokenKind::kOperator && Now().text == op;
  }
  bool IsWord(absl::string_view word) const {
    return Now().kind == TokenKind::kName && Now().text == word;
  }
  bool SkipOp(absl::string_view op) {
    if (!IsOp(op)) return false;
    Next();
    return true;
  }
  bool SkipWord(absl::string_view word) {
    if (!IsWord(word)) return false;
    Next();
    return true;
  }
  absl::Status Error(absl::string_view what) const {
    return At(Now().line, absl::StrCat(what, ", got '", Now().text.substr(0, 40), "'"));
  }
  absl::Status ExpectOp(absl::string_view op) {
    if (SkipOp(op)) return absl::OkStatus();
    return Error(absl::StrCat("expected '", op, "'"));
  }
  absl::Status ExpectBlockEnd() {
    if (Now().kind != TokenKind::kBlockEnd) return Error("expected '%}'");
    Next();
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> ExpectName() {
    if (Now().kind != TokenKind::kName) return Error("expected a name");
    std::string name = Now().text;
    Next();
    return name;
  }
  MutableNode New(NodeKind kind) const {
    auto node = std::make_unique<Node>();
    node->kind = kind;
    node->line = Now().line;
    return node;
  }
  // Every node goes through here once its children are in place.
  absl::StatusOr<NodePtr> Done(MutableNode node);
  absl::Status CheckDepth() const {
    if (depth_ > kParserDepthMax) return At(Now().line, "nested too deeply");
    return absl::OkStatus();
  }

  // Until a tag whose name is in `ends`; leaves its name as the next token.
  absl::StatusOr<Body> ParseBody(std::initializer_list<absl::string_view> ends);
  absl::StatusOr<NodePtr> ParseStatement();
  absl::StatusOr<NodePtr> ParseIf();
  absl::StatusOr<NodePtr> ParseFor();
  absl::StatusOr<NodePtr> ParseSet();
  absl::StatusOr<NodePtr> ParseMacro();
  absl::StatusOr<NodePtr> ParseTarget(bool may_be_attribute);

  absl::StatusOr<NodePtr> ParseExpression();  // with the inline if
  absl::StatusOr<NodePtr> ParseTuple(bool with_conditional, bool ends_at_in);
  absl::StatusOr<NodePtr> ParseOr();
  absl::StatusOr<NodePtr> ParseAnd();
  absl::StatusOr<NodePtr> ParseNot();
  absl::StatusOr<NodePtr> ParseCompare();
  absl::StatusOr<NodePtr> ParseSum();
  absl::StatusOr<NodePtr> ParseConcat();
  absl::StatusOr<NodePtr> ParseProduct();
  absl::StatusOr<NodePtr> ParsePower();
  absl::StatusOr<NodePtr> ParseUnary(bool with_filters);
  absl::StatusOr<NodePtr> ParsePrimary();
  absl::StatusOr<NodePtr> ParsePostfix(NodePtr node);
  absl::StatusOr<NodePtr> ParseFilters(NodePtr node, bool must_begin);
  absl::StatusOr<NodePtr> ParseSubscript(NodePtr object);
  absl::StatusOr<NodePtr> ParseTest(NodePtr value);
  absl::Status ParseArguments(Node* node);
  absl::StatusOr<NodePtr> Binary(NodeKind kind, std::string op, NodePtr left, NodePtr right);

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;
  int num_loops_ = 0;  // loops around the current tag
};

absl::StatusOr<NodePtr> Parser::Done(MutableNode node) {
  const auto cover = [&](const NodePtr& child) {
    if (child != nullptr) node->depth = std::max(node->depth, 1 + child->depth);
  };
  for (const NodePtr& child : node->children) cover(child);
  for (const auto& child : node->named) cover(child.second);
  for (const Body& body : node->bodies) {
    for (const NodePtr& child : body) cover(child);
  }
  if (node->depth > kNodeDepthMax) return At(node->line, "expression is too long");
  return NodePtr(std::move(node));
}

absl::StatusOr<Body> Parser::Run() {
  CINNABAR_ASSIGN_OR_RETURN(Body body, ParseBody({}));
  if (Now().kind != TokenKind::kEnd) return Error("unexpected tag");
  return body;
}

absl::StatusOr<Body> Parser::ParseBody(std::initializer_list<absl::string_view> ends) {
  const DepthGuard guard(&depth_);
  CINNABAR_RETURN_IF_ERROR(CheckDepth());
  const int begin_line = Now().line;
  Body body;
  while (Now().kind != TokenKind::kEnd) {
    if (Now().kind == TokenKind::kText) {
      MutableNode node = New(NodeKind::kText);
      node->constant = MakeText(Now().text);
      Next();
      CINNABAR_ASSIGN_OR_RETURN(NodePtr text, Done(std::move(node)));
      body.push_back(std::move(text));
    } else if (Now().kind == TokenKind::kVariableBegin) {
      MutableNode node = New(NodeKind::kOutput);
      Next();
      CINNABAR_ASSIGN_OR_RETURN(NodePtr value, ParseTuple(true, false));
      node->children.push_back(std::move(value));
      if (Now().kind != TokenKind::kVariableEnd) return Error("expected '}}'");
      Next();
      CINNABAR_ASSIGN_OR_RETURN(NodePtr output, Done(std::move(node)));
      body.push_back(std::move(output));
    } else {
      Next();  // {%
      for (const absl::string_view end : ends) {
        if (IsWord(end)) return body;
      }
      CINNABAR_ASSIGN_OR_RETURN(NodePtr statement, ParseStatement());
      body.push_back(std::move(statement));
    }
  }
  if (ends.size() > 0) {
    return At(begin_line, absl::StrCat("tag has no {% ", *(ends.end() - 1), " %}"));
  }
  return body;
}

absl::StatusOr<NodePtr> Parser::ParseStatement() {
  const int line = Now().line;
  if (Now().kind != TokenKind::kName) return Error("expected a tag name");
  const std::string tag = Now().text;
  if (tag == "if") return ParseIf();
  if (tag == "for") return ParseFor();
  if (tag == "set") return ParseSet();
  if (tag == "macro") return ParseMacro();
  if (tag == "break" || tag == "continue") {
    MutableNode node = New(tag == "break" ? NodeKind::kBreak : NodeKind::kContinue);
    Next();
    if (num_loops_ == 0) return At(line, absl::StrCat(tag, " outside of a loop"));
    CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
    return Done(std::move(node));
  }
  if (tag == "generation") {  // transformers' mark around what the model wrote
    MutableNode node = New(NodeKind::kBody);
    Next();
    CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
    CINNABAR_ASSIGN_OR_RETURN(Body body, ParseBody({"endgeneration"}));
    node->bodies.push_back(std::move(body));
    Next();
    CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
    return Done(std::move(node));
  }
  if (tag == "filter") {
    MutableNode node = New(NodeKind::kFilterBlock);
    Next();
    CINNABAR_ASSIGN_OR_RETURN(NodePtr filter, ParseFilters(nullptr, true));
    node->children.push_back(std::move(filter));
    CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
    CINNABAR_ASSIGN_OR_RETURN(Body body, ParseBody({"endfilter"}));
    node->bodies.push_back(std::move(body));
    Next();
    CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
    return Done(std::move(node));
  }
  for (const char* known : {"block", "call", "do", "extends", "from", "import", "include", "with",
                            "autoescape", "trans"}) {
    if (tag == known) {
      return absl::UnimplementedError(
          absl::StrCat("chat template line ", line, ": tag ", tag, " is not supported"));
    }
  }
  return Error("unknown tag");
}

absl::StatusOr<NodePtr> Parser::ParseIf() {
  MutableNode node = New(NodeKind::kIf);
  while (true) {
    Next();  // if, elif
    CINNABAR_ASSIGN_OR_RETURN(NodePtr condition, ParseTuple(false, false));
    node->children.push_back(std::move(condition));
    CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
    CINNABAR_ASSIGN_OR_RETURN(Body body, ParseBody({"elif", "else", "endif"}));
    node->bodies.push_back(std::move(body));
    if (IsWord("elif")) continue;
    if (SkipWord("else")) {
      CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
      CINNABAR_ASSIGN_OR_RETURN(Body last, ParseBody({"endif"}));
      node->bodies.push_back(std::move(last));
    }
    Next();  // endif
    CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
    return Done(std::move(node));
  }
}

absl::StatusOr<NodePtr> Parser::ParseFor() {
  MutableNode node = New(NodeKind::kFor);
  Next();
  CINNABAR_ASSIGN_OR_RETURN(NodePtr target, ParseTarget(false));
  if (!SkipWord("in")) return Error("for: expected 'in'");
  CINNABAR_ASSIGN_OR_RETURN(NodePtr iterable, ParseTuple(false, true));
  NodePtr filter;
  if (SkipWord("if")) {
    CINNABAR_ASSIGN_OR_RETURN(filter, ParseExpression());
  }
  if (IsWord("recursive")) {
    return absl::UnimplementedError(
        absl::StrCat("chat template line ", Now().line, ": for: recursive is not supported"));
  }
  CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
  ++num_loops_;
  CINNABAR_ASSIGN_OR_RETURN(Body body, ParseBody({"else", "endfor"}));
  --num_loops_;
  node->bodies.push_back(std::move(body));
  node->bodies.emplace_back();
  if (SkipWord("else")) {
    CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
    CINNABAR_ASSIGN_OR_RETURN(Body otherwise, ParseBody({"endfor"}));
    node->bodies.back() = std::move(otherwise);
  }
  Next();  // endfor
  CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
  node->children.push_back(std::move(target));
  node->children.push_back(std::move(iterable));
  node->children.push_back(std::move(filter));
  return Done(std::move(node));
}

absl::StatusOr<NodePtr> Parser::ParseSet() {
  MutableNode node = New(NodeKind::kSet);
  Next();
  CINNABAR_ASSIGN_OR_RETURN(NodePtr target, ParseTarget(true));
  node->children.push_back(std::move(target));
  if (SkipOp("=")) {
    CINNABAR_ASSIGN_OR_RETURN(NodePtr value, ParseTuple(true, false));
    node->children.push_back(std::move(value));
    CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
    return Done(std::move(node));
  }
  node->kind = NodeKind::kSetBlock;
  NodePtr filter;
  if (IsOp("|")) {
    CINNABAR_ASSIGN_OR_RETURN(filter, ParseFilters(nullptr, false));
  }
  node->children.push_back(std::move(filter));
  CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
  CINNABAR_ASSIGN_OR_RETURN(Body body, ParseBody({"endset"}));
  node->bodies.push_back(std::move(body));
  Next();
  CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
  return Done(std::move(node));
}

absl::StatusOr<NodePtr> Parser::ParseMacro() {
  MutableNode node = New(NodeKind::kMacro);
  Next();
  CINNABAR_ASSIGN_OR_RETURN(node->name, ExpectName());
  CINNABAR_RETURN_IF_ERROR(ExpectOp("("));
  while (!IsOp(")")) {
    if (!node->parameters.empty()) CINNABAR_RETURN_IF_ERROR(ExpectOp(","));
    CINNABAR_ASSIGN_OR_RETURN(std::string parameter, ExpectName());
    node->parameters.push_back(std::move(parameter));
    if (SkipOp("=")) {
      CINNABAR_ASSIGN_OR_RETURN(NodePtr value, ParseExpression());
      node->children.push_back(std::move(value));
    } else if (!node->children.empty()) {
      return Error("macro: a parameter without default follows one with a default");
    }
  }
  Next();
  CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
  const int loops_outside = std::exchange(num_loops_, 0);
  CINNABAR_ASSIGN_OR_RETURN(Body body, ParseBody({"endmacro"}));
  num_loops_ = loops_outside;
  node->bodies.push_back(std::move(body));
  Next();
  if (Now().kind == TokenKind::kName) Next();
  CINNABAR_RETURN_IF_ERROR(ExpectBlockEnd());
  return Done(std::move(node));
}

absl::StatusOr<NodePtr> Parser::ParseTarget(bool may_be_attribute) {
  const DepthGuard guard(&depth_);
  CINNABAR_RETURN_IF_ERROR(CheckDepth());
  MutableNode tuple = New(NodeKind::kTuple);
  while (true) {
    NodePtr item;
    if (SkipOp("(")) {
      CINNABAR_ASSIGN_OR_RETURN(item, ParseTarget(false));
      CINNABAR_RETURN_IF_ERROR(ExpectOp(")"));
    } else {
      MutableNode name = New(NodeKind::kName);
      CINNABAR_ASSIGN_OR_RETURN(name->name, ExpectName());
      for (const char* reserved :
           {"true", "false", "none", "True", "False", "None", "loop", "in"}) {
        if (name->name == reserved) return Error(absl::StrCat("cannot assign to ", reserved));
      }
      CINNABAR_ASSIGN_OR_RETURN(item, Done(std::move(name)));
      if (may_be_attribute && tuple->children.empty() && SkipOp(".")) {
        MutableNode attribute = New(NodeKind::kAttribute);
        CINNABAR_ASSIGN_OR_RETURN(attribute->name, ExpectName());
        attribute->children.push_back(std::move(item));
        return Done(std::move(attribute));
      }
    }
    tuple->children.push_back(std::move(item));
    if (!SkipOp(",")) break;
    if (IsWord("in") || IsOp("=") || IsOp(")")) return Done(std::move(tuple));
  }
  if (tuple->children.size() == 1) {
    NodePtr only = std::move(tuple->children[0]);
    return only;
  }
  return Done(std::move(tuple));
}

absl::StatusOr<NodePtr> Parser::ParseTuple(bool with_conditional, bool ends_at_in) {
  MutableNode tuple = New(NodeKind::kTuple);
  const auto parse = [&] { return with_conditional ? ParseExpression() : ParseOr(); };
  const auto at_end = [&] {
    return Now().kind == TokenKind::kVariableEnd || Now().kind == TokenKind::kBlockEnd ||
           IsOp(")") || (ends_at_in && (IsWord("recursive") || IsWord("if")));
  };
  bool is_tuple = false;
  while (!(is_tuple && at_end())) {
    CINNABAR_ASSIGN_OR_RETURN(NodePtr item, parse());
    tuple->children.push_back(std::move(item));
    if (!SkipOp(",")) break;
    is_tuple = true;
  }
  if (!is_tuple) {
    NodePtr only = std::move(tuple->children[0]);
    return only;
  }
  return Done(std::move(tuple));
}

absl::StatusOr<NodePtr> Parser::Binary(NodeKind kind, std::string op, NodePtr left, NodePtr right) {
  MutableNode node = New(kind);
  node->line = left->line;
  node->name = std::move(op);
  node->children.push_back(std::move(left));
  node->children.push_back(std::move(right));
  return Done(std::move(node));
}

absl::StatusOr<NodePtr> Parser::ParseExpression() {
  const DepthGuard guard(&depth_);
  CINNABAR_RETURN_IF_ERROR(CheckDepth());
  CINNABAR_ASSIGN_OR_RETURN(NodePtr value, ParseOr());
  while (IsWord("if")) {
    MutableNode node = New(NodeKind::kConditional);
    Next();
    CINNABAR_ASSIGN_OR_RETURN(NodePtr condition, ParseOr());
    NodePtr otherwise;
    if (SkipWord("else")) {
      CINNABAR_ASSIGN_OR_RETURN(otherwise, ParseExpression());
    }
    node->children.push_back(std::move(value));
    node->children.push_back(std::move(condition));
    node->children.push_back(std::move(otherwise));
    CINNABAR_ASSIGN_OR_RETURN(value, Done(std::move(node)));
  }
  return value;
}

absl::StatusOr<NodePtr> Parser::ParseOr() {
  CINNABAR_ASSIGN_OR_RETURN(NodePtr left, ParseAnd());
  while (SkipWord("or")) {
    CINNABAR_ASSIGN_OR_RETURN(NodePtr right, ParseAnd());
    CINNABAR_ASSIGN_OR_RETURN(left, Binary(NodeKind::kOr, "or", std::move(left), std::move(right)));
  }
  return left;
}

absl::StatusOr<NodePtr> Parser::ParseAnd() {
  CINNABAR_ASSIGN_OR_RETURN(NodePtr left, ParseNot());
  while (SkipWord("and")) {
    CINNABAR_ASSIGN_OR_RETURN(NodePtr right, ParseNot());
    CINNABAR_ASSIGN_OR_RETURN(left,
                              Binary(NodeKind::kAnd, "and", std::move(left), std::move(right)));
  }
  return left;
}

absl::StatusOr<NodePtr> Parser::ParseNot() {
  if (!IsWord("not")) return ParseCompare();
  const DepthGuard guard(&depth_);
  CINNABAR_RETURN_IF_ERROR(CheckDepth());
  MutableNode node = New(NodeKind::kNot);
  Next();
  CINNABAR_ASSIGN_OR_RETURN(NodePtr value, ParseNot());
  node->children.push_back(std::move(value));
  return Done(std::move(node));
}

absl::StatusOr<NodePtr> Parser::ParseCompare() {
  MutableNode node = New(NodeKind::kCompare);
  CINNABAR_ASSIGN_OR_RETURN(NodePtr first, ParseSum());
  node->children.push_back(std::move(first));
  while (true) {
    std::string op;
    for (const char* symbol : {"==", "!=", "<=", ">=", "<", ">"}) {
      if (op.empty() && SkipOp(symbol)) op = symbol;
    }
    if (op.empty() && SkipWord("in")) op = "in";
    if (op.empty() && IsWord("not") && Ahead().kind == TokenKind::kName && Ahead().text == "in") {
      Next();
      Next();
      op = "not in";
    }
    if (op.empty()) break;
    CINNABAR_ASSIGN_OR_RETURN(NodePtr operand, ParseSum());
    node->operators.push_back(std::move(op));
    node->children.push_back(std::move(operand));
  }
  if (node->operators.empty()) {
    NodePtr only = std::move(node->children[0]);
    return only;
  }
  return Done(std::move(node));
}

absl::StatusOr<NodePtr> Parser::ParseSum() {
  CINNABAR_ASSIGN_OR_RETURN(NodePtr left, ParseConcat());
  while (IsOp("+") || IsOp("-")) {
    std::string op = Now().text;
    Next();
    CINNABAR_ASSIGN_OR_RETURN(NodePtr right, ParseConcat());
    CINNABAR_ASSIGN_OR_RETURN(
        left, Binary(NodeKind::kArithmetic, std::move(op), std::move(left), std::move(right)));
  }
  return left;
}

absl::StatusOr<NodePtr> Parser::ParseConcat() {
  MutableNode node = New(NodeKind::kConcat);
  do {
    CINNABAR_ASSIGN_OR_RETURN(NodePtr part, ParseProduct());
    node->children.push_back(std::move(part));
  } while (SkipOp("~"));
  if (node->children.size() == 1) {
    NodePtr only = std::move(node->children[0]);
    return only;
  }
  return Done(std::move(node));
}

absl::StatusOr<NodePtr> Parser::ParseProduct() {
  CINNABAR_ASSIGN_OR_RETURN(NodePtr left, ParsePower());
  while (IsOp("*") || IsOp("/") || IsOp("//") || IsOp("%")) {
    std::string op = Now().text;
    Next();
    CINNABAR_ASSIGN_OR_RETURN(NodePtr right, ParsePower());
    CINNABAR_ASSIGN_OR_RETURN(
        left, Binary(NodeKind::kArithmetic, std::move(op), std::move(left), std::move(right)));
  }
  return left;
}

absl::StatusOr<NodePtr> Parser::ParsePower() {
  CINNABAR_ASSIGN_OR_RETURN(NodePtr left, ParseUnary(true));
  while (SkipOp("**")) {
    CINNABAR_ASSIGN_OR_RETURN(NodePtr right, ParseUnary(true));
    CINNABAR_ASSIGN_OR_RETURN(
        left, Binary(NodeKind::kArithmetic, "**", std::move(left), std::move(right)));
  }
  return left;
}

absl::StatusOr<NodePtr> Parser::ParseUnary(bool with_filters) {
  const DepthGuard guard(&depth_);
  CINNABAR_RETURN_IF_ERROR(CheckDepth());
  NodePtr value;
  if (IsOp("-") || IsOp("+")) {
    MutableNode node = New(IsOp("-") ? NodeKind::kNegate : NodeKind::kPlus);
    Next();
    CINNABAR_ASSIGN_OR_RETURN(NodePtr operand, ParseUnary(false));
    node->children.push_back(std::move(operand));
    CINNABAR_ASSIGN_OR_RETURN(value, Done(std::move(node)));
  } else {
    CINNABAR_ASSIGN_OR_RETURN(value, ParsePrimary());
  }
  CINNABAR_ASSIGN_OR_RETURN(value, ParsePostfix(std::move(value)));
  if (!with_filters) return value;
  return ParseFilters(std::move(value), false);
}

absl::StatusOr<NodePtr> Parser::ParsePrimary() {
  MutableNode node = New(NodeKind::kConstant);
  const Token token = Now();
  switch (token.kind) {
    case TokenKind::kName:
      Next();
      if (token.text == "true" || token.text == "True") {
        node->constant = Value(true);
      } else if (token.text == "false" || token.text == "False") {
        node->constant = Value(false);
      } else if (token.text == "none" || token.text == "None") {
        node->constant = Value(None{});
      } else {
        node->kind = NodeKind::kName;
        node->name = token.text;
      }
      return Done(std::move(node));
    case TokenKind::kString: {
      std::string text;
      while (Now().kind == TokenKind::kString) {
        text += Now().text;
        Next();
      }
      node->constant = MakeText(std::move(text));
      return Done(std::move(node));
    }
    case TokenKind::kInteger: {
      int64_t number = 0;
      int base = 10;
      absl::string_view digits = token.text;
      if (digits.size() > 1 && !IsDigit(digits[1])) {
        const char mark = static_cast<char>(std::tolower(static_cast<unsigned char>(digits[1])));
        base = mark == 'x' ? 16 : mark == 'o' ? 8 : 2;
        digits.remove_prefix(2);
      }
      const auto read = std::from_chars(digits.data(), digits.data() + digits.size(), number, base);
      if (read.ec != std::errc() || read.ptr != digits.data() + digits.size()) {
        return Error("not an integer of 64 bits");
      }
      Next();
      node->constant = Value(number);
      return Done(std::move(node));
    }
    case TokenKind::kFloat: {
      double number = 0;
      const auto read =
          std::from_chars(token.text.data(), token.text.data() + token.text.size(), number);
      if (read.ec != std::errc()) return Error("not a number");
      Next();
      node->constant = Value(number);
      return Done(std::move(node));
    }
    case TokenKind::kOperator:
      break;
    default:
      return Error("expected an expression");
  }
  if (SkipOp("(")) {
    node->kind = NodeKind::kTuple;
    if (SkipOp(")")) return Done(std::move(node));
    CINNABAR_ASSIGN_OR_RETURN(NodePtr inner, ParseTuple(true, false));
    CINNABAR_RETURN_IF_ERROR(ExpectOp(")"));
    return inner;
  }
  if (SkipOp("[")) {
    node->kind = NodeKind::kList;
    while (!IsOp("]")) {
      if (!node->children.empty()) CINNABAR_RETURN_IF_ERROR(ExpectOp(","));
      if (IsOp("]")) break;
      CINNABAR_ASSIGN_OR_RETURN(NodePtr item, ParseExpression());
      node->children.push_back(std::move(item));
    }
    Next();
    return Done(std::move(node));
  }
  if (SkipOp("{")) {
    node->kind = NodeKind::kDict;
    while (!IsOp("}")) {
      if (!node->children.empty()) CINNABAR_RETURN_IF_ERROR(ExpectOp(","));
      if (IsOp("}")) break;
      CINNABAR_ASSIGN_OR_RETURN(NodePtr key, ParseExpression());
      CINNABAR_RETURN_IF_ERROR(ExpectOp(":"));
      CINNABAR_ASSIGN_OR_RETURN(NodePtr value, ParseExpression());
      node->children.push_back(std::move(key));
      node->children.push_back(std::move(value));
    }
    Next();
    return Done(std::move(node));
  }
  return Error("expected an expression");
}

absl::StatusOr<NodePtr> Parser::ParsePostfix(NodePtr value) {
  while (true) {
    if (IsOp(".")) {
      MutableNode node = New(NodeKind::kAttribute);
      Next();
      if (Now().kind == TokenKind::kInteger) {
        node->kind = NodeKind::kItem;
        node->children.push_back(std::move(value));
        CINNABAR_ASSIGN_OR_RETURN(NodePtr index, ParsePrimary());
        node->children.push_back(std::move(index));
      } else {
        CINNABAR_ASSIGN_OR_RETURN(node->name, ExpectName());
        node->children.push_back(std::move(value));
      }
      CINNABAR_ASSIGN_OR_RETURN(value, Done(std::move(node)));
    } else if (IsOp("[")) {
      CINNABAR_ASSIGN_OR_RETURN(value, ParseSubscript(std::move(value)));
    } else if (IsOp("(")) {
      MutableNode node = New(NodeKind::kCall);
      node->children.push_back(std::move(value));
      CINNABAR_RETURN_IF_ERROR(ParseArguments(node.get()));
      CINNABAR_ASSIGN_OR_RETURN(value, Done(std::move(node)));
    } else {
      return value;
    }
  }
}

absl::StatusOr<NodePtr> Parser::ParseSubscript(NodePtr object) {
  MutableNode node = New(NodeKind::kSlice);
  Next();  // [
  std::vector<NodePtr> parts;
  bool is_slice = false;
  NodePtr part;
  while (true) {
    if (IsOp(":")) {
      is_slice = true;
      Next();
      parts.push_back(std::move(part));
      part = nullptr;
    } else if (IsOp("]")) {
      break;
    } else {
      if (part != nullptr) return Error("expected ']'");
      CINNABAR_ASSIGN_OR_RETURN(part, ParseExpression());
    }
  }
  parts.push_back(std::move(part));
  if (parts.size() > 3) return Error("a slice has at most three parts");
  Next();
  node->children.push_back(std::move(object));
  if (!is_slice) {
    if (parts[0] == nullptr) return Error("empty subscript");
    node->kind = NodeKind::kItem;
    node->children.push_back(std::move(parts[0]));
    return Done(std::move(node));
  }
  parts.resize(3);
  for (NodePtr& slice_part : parts) node->children.push_back(std::move(slice_part));
  return Done(std::move(node));
}

absl::Status Parser::ParseArguments(Node* node) {
  CINNABAR_RETURN_IF_ERROR(ExpectOp("("));
  bool is_first = true;
  while (!IsOp(")")) {
    if (!is_first) CINNABAR_RETURN_IF_ERROR(ExpectOp(","));
    if (IsOp(")")) break;
    is_first = false;
    if (Now().kind == TokenKind::kName && Ahead().kind == TokenKind::kOperator &&
        Ahead().text == "=") {
      std::string name = Now().text;
      Next();
      Next();
      CINNABAR_ASSIGN_OR_RETURN(NodePtr value, ParseExpression());
      node->named.emplace_back(std::move(name), std::move(value));
    } else {
      if (!node->named.empty()) return Error("a positional argument follows a named one");
      CINNABAR_ASSIGN_OR_RETURN(NodePtr value, ParseExpression());
      node->children.push_back(std::move(value));
    }
  }
  Next();
  return absl::OkStatus();
}

absl::StatusOr<NodePtr> Parser::ParseFilters(NodePtr value, bool must_begin) {
  while (true) {
    if (must_begin || IsOp("|")) {
      MutableNode node = New(NodeKind::kFilter);
      if (!must_begin) Next();
      must_begin = false;
      CINNABAR_ASSIGN_OR_RETURN(node->name, ExpectName());
      node->children.push_back(std::move(value));
      if (IsOp("(")) CINNABAR_RETURN_IF_ERROR(ParseArguments(node.get()));
      CINNABAR_ASSIGN_OR_RETURN(value, Done(std::move(node)));
    } else if (value != nullptr && IsWord("is")) {
      CINNABAR_ASSIGN_OR_RETURN(value, ParseTest(std::move(value)));
    } else if (value != nullptr && IsOp("(")) {
      MutableNode node = New(NodeKind::kCall);
      node->children.push_back(std::move(value));
      CINNABAR_RETURN_IF_ERROR(ParseArguments(node.get()));
      CINNABAR_ASSIGN_OR_RETURN(value, Done(std::move(node)));
    } else {
      return value;
    }
  }
}

absl::StatusOr<NodePtr> Parser::ParseTest(NodePtr value) {
  MutableNode node = New(NodeKind::kTest);
  Next();  // is
  const bool is_negated = SkipWord("not");
  if (IsOp("==")) {  // the symbols are test names too, reachable as `is eq`
    return Error("expected the name of a test");
  }
  CINNABAR_ASSIGN_OR_RETURN(node->name, ExpectName());
  node->children.push_back(std::move(value));
  if (IsOp("(")) {
    CINNABAR_RETURN_IF_ERROR(ParseArguments(node.get()));
  } else {
    const TokenKind kind = Now().kind;
    const bool is_operand =
        kind == TokenKind::kString || kind == TokenKind::kInteger || kind == TokenKind::kFloat ||
        IsOp("[") || IsOp("{") ||
        (kind == TokenKind::kName && !IsWord("else") && !IsWord("or") && !IsWord("and") &&
         !IsWord("is") && !IsWord("if") && !IsWord("in") && !IsWord("not") && !IsWord("recursive"));
    if (is_operand) {
      CINNABAR_ASSIGN_OR_RETURN(NodePtr operand, ParsePrimary());
      CINNABAR_ASSIGN_OR_RETURN(operand, ParsePostfix(std::move(operand)));
      node->children.push_back(std::move(operand));
    }
  }
  CINNABAR_ASSIGN_OR_RETURN(NodePtr test, Done(std::move(node)));
  if (!is_negated) return test;
  MutableNode negation = New(NodeKind::kNot);
  negation->children.push_back(std::move(test));
  return Done(std::move(negation));
}

}  // namespace

absl::StatusOr<std::vector<NodePtr>> ParseTemplate(absl::string_view source) {
  if (source.size() > kSourceBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("chat template of ", source.size(), " bytes, above ", kSourceBytesMax));
  }
  if (ValidUtf8End(source, 0) != source.size()) {
    return absl::InvalidArgumentError("chat template is not valid UTF-8");
  }
  std::string text = absl::StrReplaceAll(source, {{"\r\n", "\n"}, {"\r", "\n"}});
  if (absl::EndsWith(text, "\n")) text.pop_back();
  CINNABAR_ASSIGN_OR_RETURN(std::vector<Token> tokens, Lexer(std::move(text)).Run());
  return Parser(std::move(tokens)).Run();
}

}  // namespace cinnabar::chat
