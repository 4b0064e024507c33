"""Two processes train the same model as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
from transformers import DataCollatorWithPadding, TrainingArguments
from hfcompress import DistillationConfig, PruningTrainer, StructuredPruningConfig
from tests.workshop import sentences, tiny_classifier, tiny_tokenizer

folder, size = sys.argv[1], int(sys.argv[2])
tokenizer = tiny_tokenizer()
rows = [{**tokenizer(row["sentence"]), "labels": row["label"]} for row in sentences(64)]
trainer = PruningTrainer(
    tiny_classifier(),
    TrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=size, learning_rate=1e-3, optim="sgd", use_cpu=True,
        save_strategy="steps", save_steps=3, report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", dataloader_pin_memory=False,
    ),
    pruning=StructuredPruningConfig(heads=0.4, neurons=0.4, begin=0.0, end=0.6, interval=1),
    teacher=tiny_classifier(9),
    distillation=DistillationConfig(),
    train_dataset=rows,
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train()
trainer.save_model(folder + "/final")
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    # `accelerate launch` starts several processes on CPU only through MPI; torchrun sets the same variables.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for processes, size in ((1, 16), (2, 8)):
        subprocess.run(
            [*launch, "--nproc_per_node", str(processes), tmp_path / "train.py", tmp_path / str(processes), str(size)],
            check=True,
            env=environment,
            capture_output=True,
            timeout=300,
        )
    one, two = (load_file(tmp_path / n / "final" / "model.safetensors") for n in "12")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "2" / "checkpoint-6" / "rng_state_1.pth").is_file(), "only one process ran"
