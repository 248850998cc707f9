"""Generation: the cache, the steps, sampling, continuous batching, and text as it comes."""

from hcx.generate.cache import ContiguousKVCache
from hcx.generate.generator import Generator
from hcx.generate.request import Completion, FinishReason, Piece, Request, TokenLogprob
from hcx.generate.sampling import SamplingParams, sample
from hcx.generate.scheduler import Scheduler
from hcx.generate.step import EagerSteps, Steps
from hcx.generate.text import Detokenizer, TextStream

__all__ = [
    "Completion",
    "ContiguousKVCache",
    "Detokenizer",
    "EagerSteps",
    "FinishReason",
    "Generator",
    "Piece",
    "Request",
    "SamplingParams",
    "Scheduler",
    "Steps",
    "TextStream",
    "TokenLogprob",
    "sample",
]
