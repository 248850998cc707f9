"""Generation: the cache, the steps, sampling, continuous batching, and text as it comes."""

from hcx.generate.cache import ContiguousKVCache
from hcx.generate.generator import DEFAULT_MAX_SEQ, Generator, encode_prompt
from hcx.generate.request import Completion, FinishReason, Piece, Request, TokenLogprob, check_prompt
from hcx.generate.sampling import SamplingParams, sample
from hcx.generate.scheduler import Scheduler
from hcx.generate.step import EagerSteps, Steps
from hcx.generate.text import Detokenizer, TextStream

__all__ = [
    "DEFAULT_MAX_SEQ",
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
    "check_prompt",
    "encode_prompt",
    "sample",
]
