"""Schedulers that lead again: nothing that waits is forgotten. Run by ctest."""
import threading
import time
import unittest

from cluster import Cluster, post

LONG = {"model": "cinnabar-tiny", "prompt": [5, 6, 7], "max_tokens": 128, "diffusion": {"steps": 128}}
SHORT = {"model": "cinnabar-tiny", "prompt": [9, 6, 7], "max_tokens": 4, "diffusion": {"steps": 4}}


class SchedulerTest(unittest.TestCase):
    def lead_again(self, disturb):
        """While a batch runs its scheduler leads anew, with the same epoch; what comes then is served, not taken for that batch."""
        with Cluster(device="null", null_step_us=60000, proxied=True) as cluster:
            cluster.wait_ready()
            port = cluster.gateway_ports[0]
            replies = []
            running = threading.Thread(target=lambda: replies.append(post(port, "/v1/completions", LONG)[0]))
            running.start()
            time.sleep(1)
            disturb(cluster)
            begin = time.monotonic()
            status, reply, _ = post(port, "/v1/completions", {**SHORT, "diffusion": {"steps": 4, "deadline_seconds": 20}})
            self.assertEqual(status, 200, reply)
            self.assertLess(time.monotonic() - begin, 15)
            running.join()
            self.assertEqual(replies, [200])

    def test_after_a_lost_connection(self):
        def cut(cluster):
            cluster.proxies["scheduler"].set("cut")
            time.sleep(0.3)
            cluster.proxies["scheduler"].set("pass")
            time.sleep(0.5)
        self.lead_again(cut)

    def test_after_a_restart(self):
        def restart(cluster):
            cluster.schedulers[0].kill()
            cluster.schedulers[0].start()
            time.sleep(0.5)
        self.lead_again(restart)


if __name__ == "__main__":
    unittest.main(verbosity=2)
