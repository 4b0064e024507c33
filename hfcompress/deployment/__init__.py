"""Where a compressed model goes: exported to ONNX Runtime or OpenVINO, and run there.

The runtime itself is the module `hfcompress_runtime`, which needs neither torch nor transformers.
"""

from hfcompress.deployment.export import Export, ExportConfig, export
from hfcompress_runtime import Pipeline

__all__ = ["Export", "ExportConfig", "Pipeline", "export"]
