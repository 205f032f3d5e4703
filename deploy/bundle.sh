#!/usr/bin/env bash
# Packs what is built into one relocatable archive: programs, the shared libraries they need, Redis, the default model,
# service files. It runs on another x86-64 Linux whose glibc is as new as this one's; a GPU needs its driver, no more.
#   deploy/bundle.sh                     builds the release preset and packs it into build/bundle
#   deploy/bundle.sh --preset cuda       the one with the CUDA backend
#   deploy/bundle.sh --with-tests        with op tests, golden checkpoints and benchmarks, for tests/gpu/run.sh
#   --without LIBRARY                    leaves it out where the machine has it: libcublasLt comes with CUDA and with PyTorch
#   --no-build, --build DIR, --out DIR, --level N (zstd, 10)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
preset=release tests= build=1 tree= out=build/bundle level=10 without=()
usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --preset) preset=${2:?}; shift ;;
    --with-tests) tests=1 ;;
    --without) without+=("${2:?}"); shift ;;
    --no-build) build= ;;
    --build) tree=${2:?}; build=; shift ;;
    --out) out=${2:?}; shift ;;
    --level) level=${2:?}; shift ;;
    *) usage ;;
  esac
  shift
done
tree=${tree:-build/$preset}
programs=(cinnabar cinnabar-gateway cinnabar-scheduler cinnabar-worker)
benches=(engine_bench device_ceilings)

# The commands of tests that are labelled gpu: program and arguments, one a line.
op_tests() {
  ctest --test-dir "$tree" -L gpu --show-only=json-v1 2>/dev/null | python3 -c '
import json, os, sys
for test in json.load(sys.stdin)["tests"]:
    if "/tests/" in test.get("command", [""])[0]:
        print(os.path.basename(test["command"][0]), *test["command"][1:])'
}
# Those programs, and the two that a dry run takes.
op_programs() { { op_tests | cut -d' ' -f1; printf '%s\n' backend_test vocabulary_test; } | sort -u; }
if [ -n "$build" ]; then
  cmake --preset "$preset" >/dev/null
  targets=("${programs[@]}")
  if [ -n "$tests" ]; then mapfile -t -O "${#targets[@]}" targets < <(printf '%s\n' "${benches[@]}"; op_programs); fi
  cmake --build "$tree" --target "${targets[@]}"
fi
for program in "${programs[@]}"; do
  [ -x "$tree/bin/$program" ] || { echo "bundle: $tree/bin/$program is not built" >&2; exit 1; }
done
version=$("$tree/bin/cinnabar-worker" --version)  # cinnabar-worker 0.1.0 (abcdef)
number=$(awk '{print $2}' <<<"$version")
name=cinnabar-$number-linux-x86_64
stage=$out/$name
rm -rf "$stage"
mkdir -p "$stage"/{bin,lib,libexec,models,share/systemd,licenses}

# --- Programs --------------------------------------------------------------------------------------
for program in "${programs[@]}"; do strip -o "$stage/bin/$program" "$tree/bin/$program"; done
redis=$(readlink -f "$(command -v redis-server)") || { echo "bundle: redis-server is not installed" >&2; exit 1; }
cp "$redis" "$stage/libexec/redis-server"
# It is another's build, and knows nothing of our folder.
cat >"$stage/bin/redis-server" <<'SH'
#!/bin/sh
root=$(cd "${0%/*}/.." && pwd) || exit 1
LD_LIBRARY_PATH=$root/lib exec "$root/libexec/redis-server" "$@"
SH
chmod 755 "$stage/bin/redis-server" "$stage/libexec/redis-server"
elf=("$stage/libexec/redis-server")
for program in "${programs[@]}"; do elf+=("$stage/bin/$program"); done
if [ -n "$tests" ]; then
  mkdir -p "$stage/test-bin" "$stage/tests"
  for program in "${benches[@]}"; do
    cp "$tree/bin/$program" "$stage/test-bin/"
  done
  op_tests >"$stage/test-bin/op_tests.txt"
  while read -r program; do cp "$tree/tests/$program" "$stage/test-bin/"; done < <(op_programs)
  while read -r program; do elf+=("$stage/test-bin/$program"); done < <(ls "$stage/test-bin" | grep -v '\.txt$')
  cp -r tests/golden tests/gpu "$stage/tests/"
  cp -r models/cinnabar-tiny "$stage/models/"
  find "$stage/tests" -name __pycache__ -prune -exec rm -rf {} +
fi
cp -r models/cinnabar-py-4m "$stage/models/"
cp deploy/systemd/* "$stage/share/systemd/"
cp deploy/README.md "$stage/README.md"

# --- Libraries -------------------------------------------------------------------------------------
# glibc belongs to the machine, and so does what comes with a driver.
ours() { grep -Ev '/(ld-linux[^/]*|lib(c|m|dl|rt|pthread|resolv|util|anl|nsl|mvec|nss_[^/]*|BrokenLocale|thread_db|cuda|nvidia-[^/]*))\.so[^/]*$'; }
LD_LIBRARY_PATH='' ldd "${elf[@]}" | awk '/not found/ {print "bundle: " $0 > "/dev/stderr"; bad = 1}
  $2 == "=>" && $3 ~ /^\// {print $3} END {exit bad}' | sort -u | ours >"$out/libraries.txt"
for library in "${without[@]}"; do
  grep -v "/$library\.so" "$out/libraries.txt" >"$out/kept.txt" || true
  mv "$out/kept.txt" "$out/libraries.txt"
done
while read -r library; do
  cp -L "$library" "$stage/lib/"
  package=$(dpkg-query -S "$(readlink -f "$library")" 2>/dev/null | awk -F: 'NR == 1 {print $1}') || package=
  [ -n "$package" ] || continue
  dpkg-query -W -f='${Package} ${Version}\n' "$package"
  [ -e "$stage/licenses/$package" ] || cp -L "/usr/share/doc/$package/copyright" "$stage/licenses/$package" 2>/dev/null || true
done <"$out/libraries.txt" | sort -u >"$out/packages.txt"
dpkg-query -W -f='${Package} ${Version}\n' redis-server >>"$out/packages.txt" 2>/dev/null || true
cp -L /usr/share/doc/redis-server/copyright "$stage/licenses/redis-server" 2>/dev/null || true
# Every library is found in the bundle, wherever it lies, or is glibc's, or was left out.
stray=$(LD_LIBRARY_PATH="$stage/lib" ldd "$stage/libexec/redis-server" | awk '$2 == "=>" {print $3}' | ours | grep -v "$name/lib/" || true)
for file in "${elf[@]:1}"; do stray+=$(ldd "$file" | awk '$2 == "=>" {print $3}' | ours | grep -v "/$name/[^/]*/../lib/" || true); done
for library in "${without[@]}"; do stray=$(grep -v "/$library\.so" <<<"$stray" || true); done
[ -z "$stray" ] || { echo "bundle: found outside of it: $stray" >&2; exit 1; }

# --- Manifest --------------------------------------------------------------------------------------
glibc=$(for file in "${elf[@]}" "$stage"/lib/*; do objdump -T "$file" 2>/dev/null; done | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
(cd "$stage" && find . -type f ! -name SHA256SUMS ! -name manifest.json -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum >SHA256SUMS)
python3 - "$stage" "$version" "$glibc" "$out/packages.txt" "$(c++ --version | awk 'NR == 1')" <<'PY'
import json, pathlib, sys
stage, version, glibc, packages, compiler = sys.argv[1:]
root = pathlib.Path(stage)
files = []
for line in (root / "SHA256SUMS").read_text().splitlines():
    digest, path = line.split("  ", 1)
    files.append({"path": path, "bytes": (root / path).stat().st_size, "sha256": digest})
(root / "manifest.json").write_text(json.dumps({
    "name": root.name, "version": version.split(" ", 1)[1], "glibc_min": glibc.removeprefix("GLIBC_"), "compiler": compiler,
    "packages": dict(line.split(" ", 1) for line in pathlib.Path(packages).read_text().splitlines()),
    "files": files}, indent=1) + "\n")
PY
archive=$out/$name.tar.zst
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}" \
  -C "$out" -cf - "$name" | zstd -q -f -T0 "-$level" -o "$archive"
(cd "$out" && sha256sum "$name.tar.zst" >"$name.tar.zst.sha256")

echo "$archive: $(du -h --apparent-size "$archive" | cut -f1), needs glibc $(sed 's/GLIBC_//' <<<"$glibc") or newer"
echo "unpacked:"
for part in bin libexec lib models share licenses tests test-bin; do
  [ -e "$stage/$part" ] && printf '  %-9s %8s  %s files\n' "$part" "$(du -sh --apparent-size "$stage/$part" | cut -f1)" "$(find "$stage/$part" -type f | wc -l)"
done
echo "largest:"
find "$stage" -type f -printf '%s %P\n' | sort -rn | awk 'NR <= 6 {printf "  %7.1f MiB  %s\n", $1 / 1048576, $2}'
