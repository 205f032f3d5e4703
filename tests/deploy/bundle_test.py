"""A bundle, unpacked where nothing of the build is: a root folder with a C library and no other. Arguments: source folder, build folder.

CINNABAR_BUNDLE_ROOT names the root of another distribution to use instead (debootstrap --variant=minbase trixie DIR): the same tests on
its glibc. Needs root, for chroot: else those tests skip.
"""
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

SOURCE, BUILD = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
OTHER_ROOT = os.environ.get("CINNABAR_BUNDLE_ROOT")
# glibc and a shell: what a machine has at the least.
SYSTEM = ["ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libresolv.so.2"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_root(root):
    for folder in ("lib64", "lib/x86_64-linux-gnu", "bin", "dev", "proc", "tmp", "srv"):
        (root / folder).mkdir(parents=True)
    shutil.copy(pathlib.Path("/lib64") / SYSTEM[0], root / "lib64")
    for name in SYSTEM[1:]:
        shutil.copy(pathlib.Path("/lib/x86_64-linux-gnu") / name, root / "lib/x86_64-linux-gnu")
    shutil.copy("/bin/dash", root / "bin/sh")


class BundleTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="cinnabar_bundle_"))
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        made = subprocess.run([SOURCE / "deploy/bundle.sh", "--build", BUILD, "--out", cls.folder / "out", "--level", "1",
                               "--with-tests"],
                              capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise AssertionError(made.stdout + made.stderr)
        cls.report = made.stdout
        cls.archive = next((cls.folder / "out").glob("*.tar.zst"))
        cls.root = pathlib.Path(OTHER_ROOT) if OTHER_ROOT else cls.folder / "root"
        if not OTHER_ROOT:
            make_root(cls.root)
        # Packed in one folder, run from another, whose name differs as well.
        cls.place = pathlib.Path(tempfile.mkdtemp(prefix="moved ", dir=cls.root / "srv"))
        cls.addClassCleanup(shutil.rmtree, cls.place, ignore_errors=True)
        os.chmod(cls.place, 0o755)
        subprocess.run(["tar", "-C", cls.place, "--zstd", "-xf", cls.archive], check=True)
        next(cls.place.iterdir()).rename(cls.place / "cinnabar here")
        cls.bundle = cls.place / "cinnabar here"
        shutil.rmtree(cls.folder / "out" / cls.archive.name.removesuffix(".tar.zst"))

    def command(self, *words):
        """The words run with the folder as root, in a mount namespace of its own. The process is the program itself."""
        inside = [str(w).replace(str(self.root), "", 1) if str(w).startswith(str(self.root)) else str(w) for w in words]
        script = ('root=$1; shift; mount -t proc proc "$root/proc" && mount --bind /dev "$root/dev" && '
                  'exec env -i HOME=/tmp PATH=/bin "$(PATH=$PATH:/usr/sbin:/sbin command -v chroot)" "$root" "$@"')
        return ["unshare", "-m", "sh", "-c", script, "sh", str(self.root), *inside]

    def chroot(self):
        if os.geteuid() != 0:
            self.skipTest("chroot needs root")
        if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0:
            self.skipTest("no mount namespaces here")

    def run_inside(self, *words, timeout=60):
        return subprocess.run(self.command(*words), capture_output=True, text=True, timeout=timeout, check=False)

    def test_the_manifest_tells_every_file(self):
        manifest = json.loads((self.bundle / "manifest.json").read_text())
        listed = {entry["path"]: entry for entry in manifest["files"]}
        there = {str(p.relative_to(self.bundle)) for p in self.bundle.rglob("*") if p.is_file()}
        self.assertEqual(there - {"manifest.json", "SHA256SUMS"}, set(listed))
        for path, entry in listed.items():
            data = (self.bundle / path).read_bytes()
            self.assertEqual((entry["bytes"], entry["sha256"]), (len(data), hashlib.sha256(data).hexdigest()), path)
        for path in ("bin/cinnabar", "bin/cinnabar-worker", "bin/redis-server", "models/cinnabar-py-4m/model.safetensors",
                     "share/systemd/cinnabar-worker@.service", "README.md"):
            self.assertIn(path, listed)
        self.assertRegex(manifest["glibc_min"], r"^2\.\d+$")
        self.assertIn("libssl3", manifest["packages"])
        for library in (self.bundle / "lib").iterdir():  # glibc is the machine's
            self.assertNotRegex(library.name, r"^(ld-linux|lib(c|m|pthread|dl|rt|cuda|nvidia-ml))\.so")
        self.assertIn("needs glibc " + manifest["glibc_min"], self.report)
        checked = subprocess.run(["sha256sum", "-c", self.archive.name + ".sha256"], cwd=self.archive.parent, capture_output=True,
                                 check=False)
        self.assertEqual(checked.returncode, 0, checked.stderr)

    def test_every_program_starts_where_nothing_else_is(self):
        self.chroot()
        if not OTHER_ROOT:  # what it finds must come from the bundle
            self.assertEqual({p.name for p in self.root.glob("lib*/**/*.so*")}, set(SYSTEM))
        for program in ("cinnabar-gateway", "cinnabar-scheduler", "cinnabar-worker", "redis-server"):
            done = self.run_inside(self.bundle / "bin" / program, "--version")
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        # By a link from elsewhere.
        link = self.root / "tmp/cinnabar-link"
        link.unlink(missing_ok=True)
        link.symlink_to(str(self.bundle / "bin/cinnabar")[len(str(self.root)):])
        done = self.run_inside(link, "samplers")
        link.unlink()
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_a_cluster_comes_up_fills_in_and_stops(self):
        self.chroot()
        port, data = free_port(), self.place / "data"
        up = subprocess.Popen(self.command(self.bundle / "bin/cinnabar", "up", "--data", data, "--listen", f"127.0.0.1:{port}",
                                           "--grpc-listen", "", "--metrics-port", "0", "--threads", "1"),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines, is_up = [], threading.Event()

        def read():
            for line in up.stdout:
                lines.append(line)
                if "Cinnabar is up" in line:
                    is_up.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            self.assertTrue(is_up.wait(120), "".join(lines))
            maps = pathlib.Path(f"/proc/{up.pid}/maps").read_text()
            libraries = set(re.findall(r"(/\S*\.so[.\d]*)$", maps, re.M)) if " " not in str(self.bundle) else set(
                line.split(None, 5)[5] for line in maps.splitlines() if ".so" in line)
            outside = {p for p in libraries if "/cinnabar here/lib/" not in p}
            self.assertTrue(libraries - outside)
            self.assertEqual({p for p in outside if os.path.basename(p) not in SYSTEM}, set())

            link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            link.request("POST", "/v1/completions", json.dumps({"model": "cinnabar-py-4m", "prompt": "def add(a, b):\n    return ",
                                                                "suffix": "\n", "max_tokens": 8, "seed": 1}))
            reply = link.getresponse()
            body = json.loads(reply.read())
            self.assertEqual(reply.status, 200, body)
            link.close()
            # The same through the bundle's own client.
            done = self.run_inside(self.bundle / "bin/cinnabar", "generate", "--url", f"http://127.0.0.1:{port}", "--prompt",
                                   "def add(a, b):\n    return ", "--suffix", "\n", "--gen-length", "8", "--seed", "1")
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            self.assertEqual(done.stdout.strip(), body["choices"][0]["text"].strip())
            self.assertTrue(done.stdout.strip())
            up.send_signal(signal.SIGTERM)
            self.assertEqual(up.wait(60), 0, "".join(lines))
        finally:
            if up.poll() is None:
                up.kill()
            up.wait()
            reader.join(10)
            up.stdout.close()
        self.assertIn("stopped", "".join(lines))

    def test_what_goes_to_a_gpu_machine_runs_from_the_bundle(self):
        done = subprocess.run([self.bundle / "tests/gpu/run.sh", "--dry-run", "--only", "facts,op_tests,parity,invariance", "--out",
                               self.folder / "report"], capture_output=True, text=True, timeout=600, check=False, cwd="/")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        report = json.loads((self.folder / "report/report.json").read_text())
        self.assertEqual([(part["part"], part["status"]) for part in report["parts"]],
                         [(part, "passed") for part in ("facts", "op_tests", "parity", "invariance")])
        self.assertEqual(report["parts"][0]["detail"]["bundle"]["name"], "cinnabar-" + re.search(
            r"cinnabar-([\d.]+)-", self.archive.name)[1] + "-linux-x86_64")
        self.assertGreater(report["parts"][2]["detail"]["passed"], 20)

    def test_the_service_files_start_what_is_there(self):
        units = sorted((self.bundle / "share/systemd").glob("*.service"))
        self.assertEqual(len(units), 4)
        helps = {}
        for unit in units:
            text = unit.read_text()
            command = re.search(r"^ExecStart=/opt/cinnabar/(\S+)(.*)$", text, re.M)
            self.assertTrue((self.bundle / command[1]).is_file(), unit.name)
            for key in ("Restart=always", "User=cinnabar", "[Install]"):
                self.assertIn(key, text, unit.name)
            if "redis" in unit.name:
                continue
            self.assertIn("Type=notify", text, unit.name)
            self.assertIn("RestartPreventExitStatus=2", text, unit.name)
            program = os.path.basename(command[1])
            if program not in helps:
                helps[program] = subprocess.run([BUILD / "bin" / program, "--help"], capture_output=True, text=True, check=True).stdout
            for flag in re.findall(r"--[a-z-]+", command[2]):
                self.assertRegex(helps[program], rf"(?m)^ *{flag}\b", unit.name)
            for variable in re.findall(r"\$\{?(CINNABAR_\w+)", command[2]):
                self.assertRegex((self.bundle / "share/systemd/cinnabar.env").read_text(), rf"(?m)^{variable}=", unit.name)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1] + sys.argv[3:], verbosity=2)
