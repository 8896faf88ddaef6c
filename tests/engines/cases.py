"""What tests of the DeepSpeed engine share."""

from __future__ import annotations

#: Without them most weights of a small model would stay whole under stage 3.
UNSHARDED = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
        "reduce_bucket_size": 1_000_000,
    }
}
