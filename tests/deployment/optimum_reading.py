"""Opens exported folders with optimum's own classes, in an environment of transformers 4, and prints their outputs.

    PYTHON tests/deployment/optimum_reading.py JOBS

JOBS is a JSON list of `{"folder", "engine", "class", "inputs"}`; printed is a list of outputs by name.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch


def opened(job: dict[str, Any]) -> Any:
    """Opens a folder with the class for its engine and head."""
    if job["engine"] == "onnx":
        from optimum import onnxruntime as engine

        prefix, more = "ORTModel", {}
    else:
        from optimum import intel as engine

        # Else OpenVINO computes in bfloat16 where the processor has it, and rounds what enters layers of bytes.
        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        prefix, more = "OVModel", {"ov_config": exact}
    if job["class"] == "ForCausalLM":
        more |= {"use_cache": False}
    return getattr(engine, prefix + job["class"]).from_pretrained(job["folder"], **more)


def main() -> None:
    """Runs the jobs."""
    done = []
    for job in json.loads(sys.argv[1]):
        inputs = {name: torch.tensor(np.array(value)) for name, value in job["inputs"].items()}
        made = opened(job)(**inputs)
        done.append({name: value.tolist() for name, value in made.items() if isinstance(value, torch.Tensor)})
    print("\n" + json.dumps(done))


if __name__ == "__main__":
    main()
