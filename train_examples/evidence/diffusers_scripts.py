"""diffusers' own training scripts with memwatch's lines and without: the same steps, learning rate and weights?

    git clone https://github.com/huggingface/diffusers && python train_examples/evidence/diffusers_scripts.py diffusers

Puts the lines of train_examples/README.md into copies of the scripts, trains each twice on a CPU (on the same rows:
those that ``memwatch.pick`` leaves), and compares what is saved, bit for bit. ``train_text_to_image.py`` runs for three
epochs, and once more resumed from a checkpoint in the second. Needs torchvision and datasets, as those scripts do.
Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from memwatch.report.about import machine

TINY_SD = Path(__file__).resolve().parents[1] / "assets" / "tiny-sd"
ROWS, SIDE = 70, 64
SEARCHED = "    # Potentially load in the weights and states from a previous save\n"
PICK = '    picked = memwatch.pick(dataset["train"])\n    dataset["train"] = picked.train\n'
SHOW = '    print("RESULT", global_step, lr_scheduler.get_last_lr()[0])\n'
OPTIONS = f"""--resolution {SIDE} --train_batch_size 8 --learning_rate 1e-3 --lr_scheduler linear --lr_warmup_steps 0
    --checkpointing_steps 1000 --seed 1"""
DREAMBOOTH = """--instance_data_dir WATCH/train --instance_prompt sks --with_prior_preservation
    --class_data_dir WATCH/class --class_prompt dog --num_class_images 15 --max_train_steps 10"""


@dataclass(frozen=True)
class Case:
    """A script and how it is run.

    Attributes:
        model: the variable that holds what is watched. more: further arguments of ``MemWatch``.
        picks: whether line 1 goes into the script; otherwise it trains on the folder of ``memwatch pick``.
    """

    script: str
    options: str
    model: str = "unet"
    more: str = "scheduler=noise_scheduler"
    picks: bool = True


TEXT_TO_IMAGE = f"--train_data_dir DATA --caption_column text {OPTIONS}"
CASES = {
    "text to image": Case(
        "text_to_image/train_text_to_image.py",
        f"{TEXT_TO_IMAGE} --random_flip --use_ema --num_train_epochs 3 --checkpointing_steps 10",
        more="scheduler=noise_scheduler, ema=ema_unet",
    ),
    "resumed in the second epoch": Case(
        "text_to_image/train_text_to_image.py",
        f"{TEXT_TO_IMAGE} --random_flip --use_ema --num_train_epochs 3 --resume_from_checkpoint checkpoint-10",
        more="scheduler=noise_scheduler, ema=ema_unet",
    ),
    "LoRA": Case("text_to_image/train_text_to_image_lora.py", f"{TEXT_TO_IMAGE} --max_train_steps 10"),
    "DreamBooth": Case("dreambooth/train_dreambooth.py", f"{DREAMBOOTH} {OPTIONS}", picks=False),
    "DreamBooth LoRA": Case("dreambooth/train_dreambooth_lora.py", f"{DREAMBOOTH} {OPTIONS}", picks=False),
}


def with_lines(text: str, case: Case, watched: bool) -> str:
    """The script with line 1, where it has one, and with the others where it is watched."""
    anchors = ["import torch\n", SEARCHED, "    accelerator.end_training()\n"]
    missing = [anchor for anchor in anchors if anchor not in text]
    if missing:
        raise ValueError(f"{case.script}: expected the line {missing[0].strip()!r}; the script has changed")
    picked = "picked" if case.picks else '"WATCH"'
    path = "args.pretrained_model_name_or_path"
    common = "config=dict(every_steps=4, levels=dict(timesteps=[301]), strict=True), resolution=args.resolution"
    make = f"memwatch.MemWatch(accelerator, {case.model}, {path}, {picked}, {case.more}, {common},"
    lines = f"    watch = {make} output_dir=args.output_dir + '/memwatch')\n"
    lines += "    train_dataloader = watch.guard(train_dataloader)\n"
    text = text.replace("import torch\n", "import torch\nimport memwatch\n", 1)
    if case.picks:
        columns = '    column_names = dataset["train"].column_names\n'
        text = text.replace(columns, PICK + columns, 1)
    if watched:
        text = text.replace(SEARCHED, lines + SEARCHED, 1)
        text = re.sub(r"^( +)global_step \+= 1\n", r"\g<0>\1watch.on_step_end(global_step)\n", text, flags=re.MULTILINE)
    return text.replace(anchors[2], SHOW + anchors[2], 1)


def write_data(folder: Path) -> None:
    """``data``: smooth random pictures with captions; ``dog`` and ``dogs``: instance and class pictures."""
    for name, count in (("data", ROWS), ("dog", 6), ("dogs", 30)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(count):
            small = np.random.default_rng([len(name), i]).integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / name / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a photo of number {i}"}) + "\n")
        if name == "data":
            (folder / name / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "memwatch", "pick", "dog", "--out", "watch", "--prompt", "sks"]
    command += ["--class-images", "dogs", "--class-prompt", "dog", "--probes", "4"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def run(examples: Path, folder: Path, case: Case, watched: bool) -> tuple[str, Path]:
    """Train by a copy of the script. Returns its steps and last learning rate as it printed them, and what it saved."""
    name = "watched" if watched else "alone"
    script = folder / f"{Path(case.script).stem}_{name}.py"
    text = with_lines((examples / case.script).read_text(encoding="utf-8"), case, watched)
    script.write_text(text.replace("WATCH", str(folder / "watch")), encoding="utf-8")
    output = folder / f"{Path(case.script).stem}-{name}"
    options = case.options.replace("WATCH", str(folder / "watch")).replace("DATA", str(folder / "data")).split()
    command = [sys.executable, str(script), "--pretrained_model_name_or_path", str(TINY_SD)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, *options, "--output_dir", str(output)], env=environment, capture_output=True, text=True
    )
    found = re.search(r"^RESULT (.*)$", ran.stdout, flags=re.MULTILINE)
    if ran.returncode or found is None:
        raise RuntimeError(f"{script.name}: exit code {ran.returncode}\n{(ran.stdout + ran.stderr)[-3000:]}")
    return found[1], output


def same_files(one: Path, other: Path) -> tuple[int, bool]:
    """How many files of weights there are, and whether those of both folders are equal bit for bit."""
    files = [f.relative_to(one) for f in sorted(one.rglob("*.safetensors")) if not {"memwatch"} & set(f.parts)]
    files = [f for f in files if "checkpoint-" not in str(f)]

    def equal(file: Path) -> bool:
        a, b = load_file(one / file), load_file(other / file)
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return len(files), bool(files) and all(map(equal, files))


def main() -> int:
    """0 where everything is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffusers", type=Path, help="a clone of diffusers, for its examples/")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/diffusers-scripts"))
    parser.add_argument("--only", help="cases whose name contains this")
    args = parser.parse_args()
    examples = args.diffusers / "examples" if (args.diffusers / "examples").is_dir() else args.diffusers
    folder = args.output_dir.absolute()
    write_data(folder)
    print(machine("torch", "diffusers", "accelerate", "transformers", "memwatch"))
    print("\n| script | steps, last learning rate: without | with memwatch | events | files of weights | equal |")
    print("|---|---|---|---|---|---|")
    failed = False
    for name, case in CASES.items():
        if args.only and args.only not in name:
            continue
        (alone, before), (watched, after) = (run(examples, folder, case, watched) for watched in (False, True))
        number, equal = same_files(before, after)
        events = len((after / "memwatch" / "history.jsonl").read_text(encoding="utf-8").splitlines())
        failed |= not equal or alone != watched
        print(f"| {name} | {alone} | {watched} | {events} | {number} | {'yes' if equal else 'NO'} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
