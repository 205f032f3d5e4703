#!/usr/bin/env python3
"""Reads every #include "..." of the tree and fails on a dependency in the wrong direction.

The rules are those of CONTRIBUTING.md ("Who may include whom"), made finer where a folder has layers.
    usage: architecture_test.py [SOURCE_DIR]
"""
import os
import pathlib
import re
import sys

# Longest prefix wins. A file may include its own folder and what is listed; "proto" is the generated code.
ALLOWED = {
    "common/base": [],
    "common/request": ["common/base"],
    "common/gguf": ["common/base"],
    "common/tokenizer": ["common/base", "common/gguf"],
    "common/wire": ["common/base", "common/request", "proto"],
    "common/redis": ["common/base"],
    "common/queue": ["common/base", "common/redis"],
    "common/program": ["common/base", "common/config", "common/queue", "common/redis"],
    "common/config": ["common/base", "proto"],
    "common/http": ["common/base"],
    "common/keys": ["common/base", "common/queue", "common/redis", "proto"],
    "common/metrics": ["common/base", "common/http"],
    "kernels": ["common/base"],
    "worker/decoding": ["common/base", "common/request", "kernels/backend.h"],
    "worker/model": ["common/base", "common/gguf", "common/request", "kernels/backend.h", "kernels/quantized.h"],
    "worker/engine": ["common", "proto", "kernels/backend.h", "worker/decoding", "worker/model"],
    "worker": ["common", "proto", "kernels"],
    "scheduler": ["common", "proto"],
    "gateway": ["common", "proto"],
    "gateway/api": ["common/base", "common/request", "common/tokenizer", "common/wire", "proto"],
    "cli": ["common", "proto", "kernels", "worker"],
    "tests": ["common", "proto", "kernels", "worker", "scheduler", "gateway", "cli"],
}
SOURCES = {".h", ".cc", ".cu", ".cuh", ".inc"}
INCLUDE = re.compile(r'^\s*#\s*include\s+["<]([^">]+)[">]', re.MULTILINE)
OURS = re.compile(r"(common|kernels|worker|scheduler|gateway|cli|tests|proto)/")
# Libraries that a folder must do without: (folder or suffix, pattern).
FORBIDDEN = [
    ("kernels/", re.compile(r"(google/protobuf|grpc|hiredis|prometheus|nlohmann)")),
    (".cu", re.compile(r"absl/")),
    ("gateway/api/", re.compile(r"(boost|grpc|hiredis|prometheus|openssl|absl/(synchronization|time/clock))")),
]


def folder_of(path):
    """The longest rule that covers `path`, or None."""
    covering = [rule for rule in ALLOWED if path == rule or path.startswith(rule + "/")]
    return max(covering, key=len, default=None)


def wrong(path, include, quoted=True):
    """Why `path` may not include `include`; None when it may."""
    if include.startswith("cinnabar/v1/"):
        include = "proto/" + include
    for place, library in FORBIDDEN:
        if (path.startswith(place) or path.endswith(place)) and library.match(include):
            return f"{place} does without it"
    rule = folder_of(path)
    if rule is None:
        return "lies in no folder that the rules know"
    if not OURS.match(include):
        return "is not written from the repository root" if quoted and "/" not in include else None
    for target in [rule, *ALLOWED[rule]]:
        if include == target or include.startswith(target + "/"):
            return None
    return f"{rule} may not depend on it"


def check(root):
    failures, files = [], 0
    for top in sorted({rule.split("/")[0] for rule in ALLOWED}):
        for path in sorted((root / top).rglob("*")):
            if path.suffix not in SOURCES:
                continue
            files += 1
            name = path.relative_to(root).as_posix()
            for match in INCLUDE.finditer(path.read_text(encoding="utf-8")):
                include = match.group(1)
                reason = wrong(name, include, quoted='"' in match.group(0))
                if reason:
                    failures.append(f"{name} includes {include}: {reason}")
    return files, failures


def self_test():
    """The check itself must be able to fail."""
    assert wrong("kernels/cpu/a.cc", "worker/model/denoiser.h")
    assert wrong("worker/engine/a.cc", "scheduler/planning.h")
    assert wrong("common/base/a.h", "common/request/decoding_params.h")
    assert wrong("worker/decoding/a.cc", "worker/engine/engine.h")
    assert wrong("kernels/cpu/a.cc", "cinnabar/v1/sequence.pb.h")
    assert wrong("worker/engine/a.cc", "tests/support/fake.h")
    assert wrong("worker/engine/a.cc", "engine.h")
    assert wrong("kernels/cpu/a.cc", "grpcpp/grpcpp.h")
    assert wrong("kernels/cuda/a.cu", "absl/types/span.h")
    assert wrong("gateway/api/a.cc", "common/redis/client.h")
    assert wrong("gateway/api/a.cc", "boost/asio.hpp")
    assert not wrong("gateway/api/a.cc", "cinnabar/v1/work.pb.h")
    assert not wrong("worker/engine/a.cc", "absl/types/span.h")
    assert not wrong("worker/engine/a.cc", "worker/model/denoiser.h")
    assert not wrong("common/wire/a.cc", "cinnabar/v1/sequence.pb.h")


if __name__ == "__main__":
    self_test()
    source_dir = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else os.environ["CINNABAR_SOURCE_DIR"])
    num_files, problems = check(source_dir)
    print("\n".join(problems))
    print(f"{num_files} files, {len(problems)} wrong includes")
    sys.exit(1 if problems or num_files == 0 else 0)
