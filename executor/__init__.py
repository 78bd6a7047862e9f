"""Running models: the `Executor` interface, the model store, and the default executor."""

from aci_p2p.executor.api import (
    EngineDescription,
    Executor,
    ExecutorFailed,
    ExecutorStatistics,
    FinishReason,
    ForwardResult,
    Generation,
    GenerationRequest,
    Message,
    ModelInfo,
    ModelUnavailable,
    PromptTooLong,
    Sampling,
    TemplateRefused,
    TokenChunk,
    WeightsMismatch,
)
from aci_p2p.executor.process import open_process_executor
from aci_p2p.executor.progress import Progress, Report
from aci_p2p.executor.store import ModelStore, StoredModel

__all__ = [
    "EngineDescription",
    "Executor",
    "ExecutorFailed",
    "ExecutorStatistics",
    "FinishReason",
    "ForwardResult",
    "Generation",
    "GenerationRequest",
    "Message",
    "ModelInfo",
    "ModelStore",
    "ModelUnavailable",
    "Progress",
    "PromptTooLong",
    "Report",
    "Sampling",
    "StoredModel",
    "TemplateRefused",
    "TokenChunk",
    "WeightsMismatch",
    "open_process_executor",
]
