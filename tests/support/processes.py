"""Processes: forget the state of this one, and run a script on two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from weakref import WeakSet

from accelerate.state import AcceleratorState, GradientState

from memwatch.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
LOCKED: WeakSet[RunFolder] = WeakSet()
_lock = RunFolder.lock


def lock_and_remember(folder: RunFolder) -> bool:
    LOCKED.add(folder)
    return _lock(folder)


RunFolder.lock = lock_and_remember


def new_process() -> None:
    """Forget accelerate's shared state, as a new process would, and let go of the locks that end with a process."""
    for folder in list(LOCKED):
        folder.release()
    LOCKED.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def on_two_ranks(script: str, *arguments: object, folder: Path, **environment: str) -> str:
    """Run a script on two gloo processes of the CPU; what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "train_examples")))}
    processes = []
    for rank in range(2):
        with (folder / f"log{rank}").open("w", encoding="utf-8") as log:
            here = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment
            command = [sys.executable, script, *map(str, arguments)]
            processes.append(subprocess.Popen(command, env=here, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"log{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    return "\n".join(logs)
