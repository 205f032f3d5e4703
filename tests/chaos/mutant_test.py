"""A broken queue function does not get past the check: for each of chaos.py's mutants it must name a violation."""
import os
import subprocess
import sys
import unittest

from chaos import MUTANTS

HERE = os.path.dirname(os.path.abspath(__file__))
SAYS = {"ledger_twice": "2 ledger entries", "no_ledger": "no ledger entry", "quota_kept": "are under way",
        "ended_twice": "2 ledger entries", "deltas_forgotten": "VIOLATION", "keys_forgotten": "that nobody made"}
FAULTS = {"keys_forgotten": "gateway_kill"}  # else: worker_kill


class MutantTest(unittest.TestCase):
    def test_every_mutant_is_caught(self):
        self.assertEqual(sorted(SAYS), sorted(MUTANTS))
        for mutant, says in SAYS.items():
            with self.subTest(mutant):
                run = subprocess.run([sys.executable, os.path.join(HERE, "chaos.py"), "--seconds", "6" if mutant in FAULTS else "4",
                                      "--faults", FAULTS.get(mutant, "worker_kill"), "--mutant", mutant], capture_output=True, text=True, timeout=240)
                self.assertEqual(run.returncode, 1, run.stdout + run.stderr)
                self.assertIn("VIOLATION", run.stdout)
                self.assertIn(says, run.stdout)


if __name__ == "__main__":
    unittest.main(verbosity=2)
