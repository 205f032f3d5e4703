"""What people run against a cluster from a shell: generate --url, bench load, top, queue. Real processes.

Run by ctest; alone: tests/cluster/with_client.sh tests/cluster/operator_test.py
"""
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import tempfile
import termios
import threading
import time
import unittest

from cluster import BIN, Cluster, free_port, post

CINNABAR = os.path.join(BIN, "cinnabar")
PROMPT = 'def total_price(orders):\n    """Return the sum of price over all orders."""\n    return sum(order'


def run(*args, code=0, timeout=60):
    done = subprocess.run([CINNABAR, *map(str, args)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    return done


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *args, rows=30, columns=100):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm")
            os.execv(CINNABAR, [CINNABAR, *map(str, args)])
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.text = ""

    def read(self, seconds, until=None):
        """Reads on, until `until(text)` holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (until and until(self.text)):
            if not select.select([self.fd], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                break
            if not data:
                break
            self.text += data.decode(errors="replace")
        return self.text

    def end(self, number=signal.SIGINT):
        os.kill(self.pid, number)
        self.read(5)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class RealModel(unittest.TestCase):
    """The tiny model: what comes out is text."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(workers=1)
        cls.cluster.__enter__()
        cls.cluster.wait_ready()

    @classmethod
    def tearDownClass(cls):
        cls.cluster.stop()

    def generate(self, *args, **more):
        return run("generate", "--url", self.cluster.url, *args, **more)

    def test_text_json_and_watch_agree(self):
        ask = ["--prompt", PROMPT, "--gen-length", 8, "--seed", 7]
        reply = json.loads(self.generate(*ask, "--json").stdout)
        text = reply["choices"][0]["text"]
        self.assertGreater(reply["usage"]["diffusion"]["steps"], 0)
        self.assertTrue(text.strip())
        self.assertEqual(self.generate(*ask).stdout, text + "\n")
        self.assertEqual(self.generate(*ask, "--watch").stdout, text + "\n")

    def test_fill_in(self):
        filled = self.generate("--prompt", PROMPT, "--suffix", " for order in orders)\n", "--gen-length", 3).stdout
        self.assertIn("price", filled)

    def test_watch_draws_the_canvas_in_the_order_of_decisions(self):
        terminal = Terminal("generate", "--url", self.cluster.url, "--prompt", PROMPT, "--gen-length", 24, "--watch")
        terminal.read(30, lambda text: "tokens/forward" in text)
        terminal.read(5)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]), 0)
        steps = [int(step) for step in re.findall(r"step (\d+)  ", plain(terminal.text))]
        self.assertEqual(steps, sorted(steps))
        self.assertGreater(len(set(steps)), 5, steps)
        undecided = [frame.count("\u2591") for frame in re.split(r"step \d+  ", plain(terminal.text))[:-1]]
        self.assertEqual(undecided, sorted(undecided, reverse=True))
        self.assertGreater(undecided[0], 10)
        self.assertEqual(undecided[-1], 0)

    def test_errors_of_the_real_gateway(self):
        self.assertIn("no sampler", self.generate("--prompt", "x", "--sampler", "nope", code=2).stderr)
        self.assertIn("nope", self.generate("--prompt", "x", "--model", "nope", code=2).stderr)
        self.assertIn("--gen-length", run("generate", "--help").stdout)

    def test_bench_load_counts_what_the_gateway_counts(self):
        report = json.loads(run("bench", "load", "--url", self.cluster.url, "--rate", 10, "--seconds", 2, "--stream",
                                "--prompt-tokens", 16, "--canvas-tokens", 16, "--steps", 8, "--deadline", 20,
                                "--json").stdout)
        self.assertEqual(report["failed"], 0, report["errors"])
        self.assertEqual(report["ok"], report["requests"])
        self.assertEqual(report["in_deadline"], report["ok"])
        self.assertEqual(report["steps"], 8 * report["ok"])
        self.assertEqual(report["tokens_per_forward"], 2.0)
        self.assertGreater(report["prompt_tokens"], report["ok"])
        self.assertGreater(report["device_seconds"], 0)

    def test_bench_load_says_why_all_failed(self):
        out = run("bench", "load", "--url", self.cluster.url, "--rate", 10, "--seconds", 1, "--prompt-tokens", 9999,
                  code=1)
        self.assertRegex(out.stdout, r"400 context_length_exceeded: .*\d+")


class Operators(unittest.TestCase):
    """The null device: rows take as long as the test says."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(workers=2, device="null", null_step_us=20000, worker_args=("--dollars-per-hour", "3.6"))
        cls.cluster.__enter__()
        cls.cluster.wait_ready()
        cls.redis = ("--redis", cls.cluster.redis_address)

    @classmethod
    def tearDownClass(cls):
        cls.cluster.stop()

    def top(self, *args):
        return json.loads(run("top", *self.redis, "--once", "--json", *args).stdout)

    def load(self, rate=20, seconds=8):
        load = subprocess.Popen([CINNABAR, "bench", "load", "--url", self.cluster.url, "--rate", str(rate),
                                 "--seconds", str(seconds), "--prompt-tokens", "16", "--canvas-tokens", "32", "--steps",
                                 "16", "--priority", "mix", "--json"], stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True)
        self.addCleanup(load.wait)
        self.addCleanup(load.stdout.close)
        self.addCleanup(load.kill)
        return load

    def start_long(self, steps=150):
        """A request that takes `steps` steps; its thread, and a dict that gets the reply."""
        got = {}

        def ask():
            try:
                got["reply"] = post(self.cluster.gateway_ports[0], "/v1/completions",
                                    {"model": "cinnabar-tiny", "prompt": "x", "max_tokens": steps,
                                     "diffusion": {"steps": steps}}, {"x-request-id": "from-a-test"})
            except OSError as error:
                got["error"] = error
        thread = threading.Thread(target=ask)
        thread.start()
        self.addCleanup(thread.join)
        return thread, got

    def running_id(self):
        """The id of a request that runs, as the ledger and the queue name it."""
        out = subprocess.run(["redis-cli", "-p", str(self.cluster.redis_port), "--scan", "--pattern", "*:r:*"],
                             capture_output=True, text=True, check=True).stdout
        for key in out.split():
            request = key.rsplit(":r:", 1)[1]
            shown = json.loads(run("queue", "show", request, *self.redis, "--json").stdout.splitlines()[0])
            if shown["state"] == "running":
                return request, shown
        return None, None

    def test_top_measures_what_the_load_measures(self):
        load = self.load()
        time.sleep(4)
        seen = self.top("--gateway", self.cluster.url)
        report = json.loads(load.communicate(timeout=60)[0])
        self.assertEqual(report["failed"], 0, report["errors"])
        self.assertEqual([worker["name"] for worker in seen["workers"]], ["worker-0", "worker-1"])
        # 20 a second, each of 32 tokens in 16 steps: 640 tokens/s, in a window of a second or two.
        self.assertGreater(seen["tokens_per_second"], 250)
        self.assertLess(seen["tokens_per_second"], 1300)
        self.assertAlmostEqual(seen["tokens_per_forward"], 2.0, 1)
        self.assertGreater(seen["ended_per_second"]["done"], 5)
        if seen["forwards_per_answer"] is not None:
            self.assertAlmostEqual(seen["forwards_per_answer"], 16, 0)
        self.assertGreater(seen["busy_ratio"], 0.05)
        for worker in seen["workers"]:
            self.assertEqual(worker["model"], "cinnabar-tiny")
            self.assertIn(worker["state"], ("busy", "idle"))
            if worker["step_seconds"] is not None:
                self.assertGreater(worker["step_seconds"], 0.015)
                self.assertLess(worker["step_seconds"], 0.2)
        self.assertAlmostEqual(seen["dollars_per_second"], 0.002, 5)
        self.assertGreater(seen["dollars_per_million_tokens"], 0)
        self.assertEqual(seen["waste_ratio"], 0)
        self.assertGreater(seen["gateway"]["requests_per_second"], 5)
        self.assertGreater(seen["gateway"]["p50_seconds"], 0.2)

    def test_top_live(self):
        two = r"\b(2|2\.0\d|1\.9\d) tokens/forward"  # between two scrapes
        terminal = Terminal("top", *self.redis, "--gateway", self.cluster.url, "--interval", "0.5", rows=30, columns=100)
        self.load(seconds=6)
        text = terminal.read(10, lambda text: "\u2588" in text and re.search(two, plain(text)))
        self.assertEqual(terminal.end(), -signal.SIGINT)
        shown = plain(text)
        self.assertRegex(shown, two)
        for words in ("interactive", "standard", "batch", "worker-0", "worker-1", "tokens/s", "$0.002000 /s", "busy", "streams"):
            self.assertIn(words, shown)
        # The terminal is left as it was found.
        self.assertTrue(terminal.text.endswith("\x1b[?25h\x1b[?1049l"), repr(terminal.text[-40:]))

    def test_a_killed_worker_is_shown_as_gone(self):
        terminal = Terminal("top", *self.redis, "--interval", "0.3")
        terminal.read(5, lambda text: "worker-1" in text)
        self.cluster.workers[1].kill()
        try:
            text = terminal.read(20, lambda text: "gone" in text)
            self.assertRegex(plain(text), r"worker-1\s+gone")
            self.assertEqual(len(self.top()["workers"]), 1)
        finally:
            terminal.end()
            self.cluster.workers[1].start()
            deadline = time.monotonic() + 20
            while len(self.top()["workers"]) < 2 and time.monotonic() < deadline:
                pass

    def test_show_and_cancel(self):
        thread, got = self.start_long()
        request = None
        deadline = time.monotonic() + 10
        while not request and time.monotonic() < deadline:
            request, shown = self.running_id()
        self.assertTrue(request)
        self.assertEqual(shown["tenant"], "local")
        self.assertEqual(shown["attempt"], 1)
        self.assertEqual(json.loads(run("queue", "stats", *self.redis, "--json").stdout)["live"], 1)
        # The name that clients know means all choices.
        outside = "cmpl-" + request.rsplit(".", 1)[0]
        self.assertIn("running", run("queue", "show", outside, *self.redis).stdout)
        self.assertIn(f"{request}: cancelled", run("queue", "cancel", outside, *self.redis).stdout)
        thread.join(20)
        self.assertFalse(thread.is_alive())
        self.assertNotEqual(got["reply"][0], 200, got)
        shown = run("queue", "show", request, *self.redis).stdout
        self.assertIn("cancelled: cancelled by an operator", shown)
        # Twice is once; what ended stays ended.
        self.assertIn("cancelled", run("queue", "cancel", request, *self.redis).stdout)
        self.assertEqual(json.loads(run("queue", "stats", *self.redis, "--json").stdout)["live"], 0)

    def test_dead_letters_are_shown(self):
        self.assertIn("no dead letters", run("queue", "dead", *self.redis).stdout)
        keys = subprocess.run(["redis-cli", "-p", str(self.cluster.redis_port), "--scan", "--pattern", "*:ledger"],
                              capture_output=True, text=True, check=True).stdout.split()
        if not keys:  # nothing has ended yet
            post(self.cluster.gateway_ports[0], "/v1/completions",
                 {"model": "cinnabar-tiny", "prompt": "x", "max_tokens": 4, "diffusion": {"steps": 4}})
            keys = subprocess.run(["redis-cli", "-p", str(self.cluster.redis_port), "--scan", "--pattern", "*:ledger"],
                                  capture_output=True, text=True, check=True).stdout.split()
        letters = keys[0].rsplit(":", 1)[0] + ":dlq"
        for i in range(3):
            subprocess.run(["redis-cli", "-p", str(self.cluster.redis_port), "XADD", letters, "*", "rid", f"r{i}", "tn",
                            "acme", "tag", "t", "why", "it kept crashing", "own", "w", "att", "3", "stp", "7", "bh", ""],
                           check=True, capture_output=True)
        shown = run("queue", "dead", *self.redis).stdout
        self.assertRegex(shown, r"r2 .*tenant acme .*3 attempts, 7 steps")
        self.assertIn("it kept crashing", shown)
        self.assertIn("3 dead letters", run("top", *self.redis, "--once").stdout)
        newest = run("queue", "dead", "--max", 1, "--json", *self.redis).stdout.splitlines()
        self.assertEqual([json.loads(line)["request"] for line in newest], ["r2"])
        self.assertEqual(json.loads(run("queue", "stats", *self.redis, "--json").stdout)["dead_letters"], 3)
        self.assertIn("1 forgotten", run("queue", "dead", "--max", 1, "--drop", *self.redis).stdout)
        left = run("queue", "dead", "--drop", "--json", *self.redis).stdout.splitlines()
        self.assertEqual([json.loads(line)["request"] for line in left], ["r1", "r0"])
        self.assertIn("no dead letters", run("queue", "dead", *self.redis).stdout)


class Errors(unittest.TestCase):
    def test_they_name_the_fix(self):
        nobody = ("--redis", f"127.0.0.1:{free_port()}")
        for args, code, words in [
                (["queue"], 2, "stats, show ID, cancel ID or dead"), (["queue", "list"], 2, "no such word"),
                (["queue", "show"], 2, "cmpl-req_"), (["queue", "stats", "now"], 2, "one word too many"),
                (["queue", "dead", "--max", 0], 2, "--max"), (["queue", "stats", "--drop"], 2, "--drop is for dead"),
                (["queue", "stats", *nobody], 1, "cinnabar up"), (["queue", "stats", "--redis", "x"], 2, "127.0.0.1:6379"),
                (["top", "--json"], 2, "--once"), (["top"], 2, "--once"), (["top", "--once", "--interval", 0], 2, "0.1"),
                (["top", "--once", *nobody], 1, "cinnabar up"), (["top", "here"], 2, "--redis")]:
            with self.subTest(args=args):
                self.assertIn(words, run(*args, code=code).stderr)
        for command in ("top", "queue"):
            self.assertIn("examples:", run(command, "--help").stdout)

    def test_an_empty_redis_is_not_turned_into_a_queue(self):
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            redis = subprocess.Popen(["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save",
                                      ""], stdout=subprocess.DEVNULL)
            try:
                address = ("--redis", f"127.0.0.1:{port}")
                deadline = time.monotonic() + 10
                err = "cannot"
                while "does a cluster run there" not in err and time.monotonic() < deadline:
                    err = run("queue", "stats", *address, code=1).stderr
                self.assertIn("does a cluster run there", err)
                self.assertIn("does a cluster run there", run("top", "--once", *address, code=1).stderr)
                size = subprocess.run(["redis-cli", "-p", str(port), "DBSIZE"], capture_output=True, text=True, check=True)
                self.assertEqual(size.stdout.strip(), "0")
                functions = subprocess.run(["redis-cli", "-p", str(port), "FUNCTION", "LIST"], capture_output=True,
                                           text=True, check=True)
                self.assertEqual(functions.stdout.strip(), "")
            finally:
                redis.kill()
                redis.wait()


if __name__ == "__main__":
    unittest.main(verbosity=1)
