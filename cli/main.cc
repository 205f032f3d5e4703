// The `cinnabar` program: hands the arguments to a subcommand.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cli/commands.h"

namespace {

struct Command {
  const char* name;
  const char* summary;
  int (*run)(const std::vector<std::string>& args);
};

constexpr Command kCommands[] = {
    {"generate", "denoise a prompt, a fill-in or a chat turn, here or on a running gateway",
     cinnabar::RunGenerate},
    {"bench", "put load on a gateway: latency percentiles, goodput, tokens/s", cinnabar::RunBench},
    {"keys", "create, list and revoke API keys", cinnabar::RunKeys},
    {"logits", "write the logits of one forward pass, to compare with other implementations",
     cinnabar::RunLogits},
    {"model", "inspect a checkpoint", cinnabar::RunModel},
    {"score", "estimate the likelihood of a text", cinnabar::RunScore},
    {"top", "watch a running cluster: queues, workers, tokens/s, waste, cost", cinnabar::RunTop},
    {"queue", "look into the queue, cancel requests, read the dead letters", cinnabar::RunQueue},
    {"up", "run a whole cluster on this machine", cinnabar::RunUp},
    {"samplers", "list the samplers and the knobs that each one reads", cinnabar::RunSamplers},
};

void PrintUsage(std::FILE* out) {
  std::fputs(
      "usage: cinnabar COMMAND [flags]\n\nServes diffusion language models: text that emerges from "
      "noise, all "
      "positions at once.\n\n",
      out);
  for (const Command& command : kCommands)
    std::fprintf(out, "  %-10s %s\n", command.name, command.summary);
  std::fputs("\ncinnabar COMMAND --help explains a command.\n", out);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    PrintUsage(stderr);
    return 2;
  }
  const std::string name = argv[1];
  if (name == "--help" || name == "-h" || name == "help") {
    PrintUsage(stdout);
    return 0;
  }
  const std::vector<std::string> args(argv + 2, argv + argc);
  for (const Command& command : kCommands) {
    if (name == command.name) return command.run(args);
  }
  std::fprintf(stderr, "cinnabar: no command \"%s\"; cinnabar --help lists them\n", name.c_str());
  return 2;
}
