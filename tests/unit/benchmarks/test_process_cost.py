"""The CPU time of everything that a process has started is counted, also of what has ended since."""

import os
import subprocess
import sys
import time

from valley_ray.benchmarks.process_cost import TreeWatch, process_tree

BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"


def test_tree_counts_children_of_children_and_says_what_they_are():
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN.format(seconds=0.6)!r} + 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code, "ray::_map_task"], stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 30
        while sum(cost.cpu_s for cost in process_tree(child.pid)) < 0.6:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        costs = {cost.pid: cost for cost in process_tree(os.getpid())}
        assert costs[os.getpid()].kind == "driver"
        assert costs[child.pid].kind == "worker"
        (burner,) = [cost for cost in process_tree(child.pid) if cost.pid != child.pid]
        assert burner.cpu_s >= 0.5  # of the sum, its parent has used the rest
        assert burner.rss_bytes > 1e6
        child.communicate(b"\n")


def test_what_a_process_has_used_still_counts_after_its_end():
    code = BURN.format(seconds=0.6) + "input()"
    with TreeWatch() as watch:
        before = watch.cpu_s()["pool"]
        with subprocess.Popen([sys.executable, "-c", code, "multiprocessing"], stdin=subprocess.PIPE) as child:
            deadline = time.monotonic() + 30
            while watch.cpu_s()["pool"] - before < 0.5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            child.communicate(b"\n")
        after = watch.cpu_s()["pool"]
    assert after - before >= 0.5
