"""`cinnabar up`: a whole cluster starts, serves, mends itself and stops. Arguments: the program, the source folder."""
import http.client
import json
import os
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

CINNABAR, SOURCE = sys.argv[1], sys.argv[2]
MODEL = os.path.join(SOURCE, "models/cinnabar-tiny")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def children_of(pid):
    found = {}
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/stat", encoding="utf-8") as stat:
                name, rest = re.match(r"\d+ \((.*)\) (.*)", stat.read(), re.S).groups()
        except (OSError, AttributeError):
            continue
        if int(rest.split()[1]) == pid and rest.split()[0] != "Z":
            found.setdefault(name, []).append(int(entry))
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Up:
    """`cinnabar up` as a child, its output read by a thread."""

    def __init__(self, data, *flags):
        self.port = free_port()
        self.child = subprocess.Popen(
            [CINNABAR, "up", "--data", data, "--model", MODEL, "--listen", f"127.0.0.1:{self.port}", "--grpc-listen",
             f"127.0.0.1:{free_port()}", "--metrics-port", "0", "--threads", "1", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)
        self.key = None
        self.lines = []
        self.changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with self.child.stdout as lines:
            for line in lines:
                with self.changed:
                    self.lines.append(line.rstrip("\n"))
                    self.changed.notify_all()

    def wait_for(self, text, timeout=60, after=0):
        end = time.monotonic() + timeout
        with self.changed:
            while not any(text in line for line in self.lines[after:]):
                left = end - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"no {text!r} in:\n" + "\n".join(self.lines))
                self.changed.wait(left)

    def complete(self):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            link.request("POST", "/v1/completions", json.dumps(
                {"model": "cinnabar-tiny", "prompt": "def add(a, b):\n    return a", "max_tokens": 8, "seed": 3}),
                {"authorization": f"Bearer {self.key}"} if self.key else {})
            reply = link.getresponse()
            body = json.loads(reply.read())
            if reply.status != 200:
                raise AssertionError(body)
            return body["choices"][0]["text"]
        finally:
            link.close()

    def stop(self):
        self.child.send_signal(signal.SIGINT)
        return self.child.wait(60)


class UpTest(unittest.TestCase):
    def setUp(self):
        self.data = tempfile.mkdtemp(prefix="cinnabar_up_")
        self.running = []

    def tearDown(self):
        for up in self.running:
            if up.child.poll() is None:
                pids = [pid for group in children_of(up.child.pid).values() for pid in group]
                up.child.kill()
                up.child.wait()
                for pid in pids:  # they end by themselves, but not always before the next test
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
        shutil.rmtree(self.data, ignore_errors=True)

    def up(self, *flags):
        up = Up(self.data, *flags)
        self.running.append(up)
        return up

    def test_serves_mends_itself_and_stops(self):
        up = self.up()
        up.wait_for("Cinnabar is up")
        text = up.complete()
        children = children_of(up.child.pid)
        self.assertEqual(sorted(children), ["cinnabar-gatewa", "cinnabar-schedu", "cinnabar-worker", "redis-server"])
        before = len(up.lines)
        os.kill(children["cinnabar-worker"][0], signal.SIGKILL)
        up.wait_for("worker-0 ended by signal 9; starts again", after=before)
        up.wait_for("worker_starts", after=before)
        self.assertEqual(up.complete(), text)
        pids = [pid for group in children_of(up.child.pid).values() for pid in group]
        self.assertEqual(up.stop(), 0)
        self.assertEqual([pid for pid in pids if alive(pid)], [])
        up.wait_for("stopped")
        order = [line.split(" |")[0].strip() for line in up.lines if "event=stops" in line or "bye bye" in line]
        self.assertEqual(order, ["gateway", "worker-0", "scheduler", "redis"])

        again = self.up("--workers", "2")
        again.wait_for("Cinnabar is up")
        self.assertEqual(len(children_of(again.child.pid)["cinnabar-worker"]), 2)
        self.assertEqual(again.complete(), text)
        self.assertEqual(again.stop(), 0)

    def test_with_keys_only_their_owners_are_served(self):
        up = self.up("--device", "null", "--keys")
        up.wait_for("Cinnabar is up")
        with self.assertRaisesRegex(AssertionError, "invalid_api_key"):
            up.complete()
        made = subprocess.run([CINNABAR, "keys", "create", "--pepper", f"{self.data}/pepper", "--tenant", "me", "--redis",
                               f"{self.data}/redis.sock"], capture_output=True, text=True, timeout=30, check=True)
        up.key = made.stdout.strip()
        end = time.monotonic() + 10
        while True:
            try:
                up.complete()
                break
            except AssertionError:
                self.assertLess(time.monotonic(), end)
                time.sleep(0.1)
        self.assertEqual(up.stop(), 0)

    def test_two_clusters_never_share_a_folder(self):
        first = self.up("--device", "null")
        first.wait_for("Cinnabar is up")
        second = self.up()
        self.assertEqual(second.child.wait(30), 1)
        second.wait_for("belongs to a cluster that is up")
        self.assertEqual(first.stop(), 0)

    def test_children_end_with_it(self):
        up = self.up("--device", "null")
        up.wait_for("Cinnabar is up")
        pids = [pid for group in children_of(up.child.pid).values() for pid in group]
        self.assertEqual(len(pids), 4)
        up.child.kill()
        up.child.wait()
        end = time.monotonic() + 40
        while any(alive(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(0.05)
        self.assertEqual([pid for pid in pids if alive(pid)], [])

    def test_a_wrong_flag_of_a_program_ends_it_with_the_reason(self):
        up = self.up("--worker-flag=--no-such-flag")
        self.assertEqual(up.child.wait(60), 1)
        up.wait_for("--no-such-flag")
        up.wait_for("worker-0 does not start")

    def test_a_device_that_is_gone_restarts_its_worker_and_the_answer_is_the_same(self):
        up = self.up("--device", "null", "--worker-flag=--null-passes=20", "--worker-flag=--snapshot-every=4")
        up.wait_for("Cinnabar is up")
        text = up.complete()
        answers = 0
        end = time.monotonic() + 60
        while answers < 5:  # 8 passes each: the device goes in the middle of some
            self.assertLess(time.monotonic(), end)
            try:
                self.assertEqual(up.complete(), text)
                answers += 1
            except AssertionError as error:  # a new request is refused while no worker is there
                self.assertIn("no worker serves this model", str(error))
                time.sleep(0.1)
        up.wait_for("worker-0 ended with status 3; starts again")
        up.wait_for("the null device is gone")
        up.wait_for("event=device_failed")
        self.assertEqual(up.stop(), 0)

    def test_a_model_that_does_not_fit_is_refused_with_the_numbers(self):
        up = self.up("--worker-flag=--tokens-max=2000000000")
        self.assertEqual(up.child.wait(60), 1)
        up.wait_for("does not fit on cpu: weights")
        up.wait_for("for one sequence of")
        up.wait_for("worker-0 does not start: ended with status 2")

    def test_errors_name_the_fix(self):
        for flags, status, text in (
                (["--workers", "0"], 2, "--workers 0: take 1 to 64"),
                (["--fsync", "never"], 2, "take always or everysec"),
                (["--model", self.data], 1, "holds no config.json"),
                (["--redis", "nowhere"], 2, "write it as 127.0.0.1:6379"),
                (["--what"], 2, "--what"),
                (["--device", "gpu"], 2, "take cpu, cuda or cuda:N"),
                (["--devices", "0,x"], 2, "write it as 0,1"),
                (["--devices", "0,1,0"], 2, "0 is there twice"),
                (["--devices", "0", "--workers", "2"], 2, "leave --device and --workers out"),
                (["--data", os.path.join(self.data, "x" * 120)], 2, "take a shorter one")):
            data = [] if "--data" in flags else ["--data", self.data]
            done = subprocess.run([CINNABAR, "up", *data, *flags], capture_output=True, text=True, timeout=30)
            self.assertEqual(done.returncode, status, done.stderr)
            self.assertIn(text, done.stderr)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1] + sys.argv[3:], verbosity=2)
