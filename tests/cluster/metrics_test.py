"""What Prometheus scrapes of the three programs after some traffic: promtool has nothing to say, and the numbers agree."""
import os
import re
import shutil
import subprocess
import threading
import unittest

from cluster import Cluster, get, post, stream

PROMTOOL = os.environ.get("CINNABAR_PROMTOOL") or shutil.which("promtool")
MODEL = "cinnabar-tiny"


def metrics_port(process):
    return int(re.search(r"metrics=[\w.]+:(\d+)", process.log()).group(1))


def samples(text):
    """{(name, {label: value} as sorted pairs): value}"""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, labels, value = re.fullmatch(r"([a-z_:0-9]+)(?:\{(.*)\})? (\S+)", line).groups()
            pairs = tuple(sorted(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")))
            found[name, pairs] = float(value)
    return found


def total(texts, name, **labels):
    return sum(value for text in texts for (other, pairs), value in samples(text).items()
               if other == name and labels.items() <= dict(pairs).items())


@unittest.skipUnless(PROMTOOL, "promtool is missing: tests/install_tools.sh")
class MetricsTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(workers=2, device="null", null_step_us=1000, worker_args=["--dollars-per-hour", "3.6"])
        cls.cluster.start().wait_ready()
        port = cls.cluster.gateway_ports[0]
        body = {"model": MODEL, "prompt": "def f():", "max_tokens": 16, "diffusion": {"steps": 8}}

        def ask(more):
            if "stream" in more:
                list(stream(port, "/v1/completions", {**body, **more}))
            else:
                post(port, "/v1/completions", {**body, **more})

        threads = [threading.Thread(target=ask, args=(more,)) for more in
                   8 * [{}] + 4 * [{"stream": True}] + [{"diffusion": {"steps": -1}}, {"max_tokens": 10**9}, {"model": "none"}]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cls.gateway = get(port, "/metrics")[1].decode()
        cls.scheduler = get(metrics_port(cls.cluster.schedulers[0]), "/metrics")[1].decode()
        cls.workers = [get(metrics_port(worker), "/metrics")[1].decode() for worker in cls.cluster.workers]

    @classmethod
    def tearDownClass(cls):
        cls.cluster.stop()

    def test_promtool_has_nothing_to_say(self):
        for text in (self.gateway, self.scheduler, *self.workers):
            said = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
            self.assertEqual((said.returncode, said.stdout, said.stderr), (0, "", ""))

    def test_promtool_would_say_something(self):
        said = subprocess.run([PROMTOOL, "check", "metrics"], input=self.gateway.replace("_total", "_sum_of_all"),
                              capture_output=True, text=True, timeout=60)
        self.assertNotEqual(said.returncode, 0)

    def test_the_three_programs_count_the_same(self):
        gateway, scheduler, workers = [self.gateway], [self.scheduler], self.workers
        self.assertEqual(total(gateway, "cinnabar_gateway_requests_total", outcome="ok"), 12)
        self.assertEqual(total(gateway, "cinnabar_gateway_requests_total", outcome="client_error"), 3)
        self.assertEqual(total(scheduler, "cinnabar_dispatched_requests_total", verdict="ok"), 12)
        self.assertEqual(total(workers, "cinnabar_tokens_total", direction="output"),
                         total(gateway, "cinnabar_gateway_tokens_total", direction="output"))
        self.assertEqual(total(workers, "cinnabar_denoise_steps_per_request_count"), 12)
        self.assertEqual(total(workers, "cinnabar_denoise_steps_per_request_sum"), 12 * 8)
        busy = total(workers, "cinnabar_device_busy_seconds_total")
        self.assertGreater(busy, 12 * 8 * 0.001 / 16)
        self.assertAlmostEqual(total(workers, "cinnabar_cost_dollars_total"), busy * 3.6 / 3600, delta=1e-9)
        # Each answer is charged its share of the steps that it ran in.
        charged = total(gateway, "cinnabar_request_device_seconds_total", **{"class": "standard"})
        self.assertAlmostEqual(charged, busy, delta=0.02 * busy)


if __name__ == "__main__":
    unittest.main(verbosity=2)
