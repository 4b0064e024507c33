"""Two processes train the same student and projections as one, and share one cache."""

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
from hfcompress import DistillationConfig, DistillationTrainer
from tests.workshop import sentences, tiny_classifier, tiny_tokenizer

folder, size = sys.argv[1], int(sys.argv[2])
tokenizer = tiny_tokenizer()
trainer = DistillationTrainer(
    tiny_classifier(),
    TrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=size, learning_rate=1e-2, optim="sgd", use_cpu=True,
        save_strategy="steps", save_steps=3, report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", dataloader_pin_memory=False,
    ),
    teacher=tiny_classifier(9, hidden_size=96, num_attention_heads=6, num_hidden_layers=4),
    distillation=DistillationConfig(hidden=1.0, embeddings=1.0, cache=True),
    train_dataset=[{**tokenizer(row["sentence"]), "labels": row["label"]} for row in sentences(64)],
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train()
"""


OF_TOKENS = """
import sys
from transformers import DataCollatorForTokenClassification, TrainingArguments
from hfcompress import DistillationConfig, DistillationTrainer
from tests.methods.test_distillation import language_model, token_rows
from tests.workshop import tiny_tokenizer

folder, size = sys.argv[1], int(sys.argv[2])
trainer = DistillationTrainer(
    language_model(0),
    TrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=size, learning_rate=1e-2, optim="sgd", use_cpu=True,
        gradient_accumulation_steps=1 if size == 16 else 2, save_strategy="steps", save_steps=6, report_to="none",
        disable_tqdm=True, lr_scheduler_type="constant", train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    ),
    teacher=language_model(9),
    distillation=DistillationConfig(hidden=1.0, embeddings=1.0, attention=1.0),
    train_dataset=token_rows(32),
    data_collator=DataCollatorForTokenClassification(tiny_tokenizer()),
)
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("script", "each"), [(SCRIPT, 8), (OF_TOKENS, 4)])
def test_two_processes_are_one(script: str, each: int, tmp_path: Path) -> None:
    """With projections and a cache; and over tokens of which many have no label, accumulated in two batches."""
    (tmp_path / "train.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for processes, size in ((1, 16), (2, each)):
        subprocess.run(
            [*launch, "--nproc_per_node", str(processes), tmp_path / "train.py", tmp_path / str(processes), str(size)],
            check=True,
            env=environment,
            capture_output=True,
            timeout=300,
        )
    for file in ("model.safetensors", "hfcompress_parts.safetensors"):
        one, two = (load_file(tmp_path / n / "checkpoint-6" / file) for n in "12")
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "2" / "checkpoint-6" / "rng_state_1.pth").is_file(), "only one process ran"
