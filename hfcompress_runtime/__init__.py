"""Runs what `hfcompress export` wrote, called like a transformers pipeline.

It needs numpy, tokenizers and the engine (onnxruntime or openvino), and neither torch nor transformers; images given
as files need Pillow. That is why it stands beside the package, whose import loads both: `pip install --no-deps
hfcompress` next to the three is enough, and so is a copy of this one folder.

    from hfcompress_runtime import Pipeline

    classify = Pipeline.from_pretrained("exported")
    classify(["A fine film."])  # [{'label': 'positive', 'score': 0.98}]
"""

from hfcompress_runtime.engines import Arrays
from hfcompress_runtime.manifest import ENGINES, FORMAT, MANIFEST, TASKS, Manifest, RuntimeFolderError
from hfcompress_runtime.pipeline import Pipeline, Precision, Text

__all__ = [
    "ENGINES",
    "FORMAT",
    "MANIFEST",
    "TASKS",
    "Arrays",
    "Manifest",
    "Pipeline",
    "Precision",
    "RuntimeFolderError",
    "Text",
]
