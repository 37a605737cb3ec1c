"""The suite: which tasks there are, which patterns each asks for, and its size."""

from __future__ import annotations

from experiments.data.clouds import Clouds
from experiments.data.series import Series
from experiments.data.shapes import Shapes
from experiments.data.speech import Speech
from experiments.data.summaries import Summaries
from experiments.data.text import Text
from experiments.measure.cab.space import (
    CompletionTask, ForecastTask, SuperResolutionTask,
)
from experiments.measure.cab.speech import FastSpeechTask, TransformerTTSTask
from experiments.measure.cab.task import Task
from experiments.measure.cab.text import LMTask, MaskedLMTask, SummaryTask

FULL: tuple[Task, ...] = (
    FastSpeechTask(Speech(length=96, count=16), steps=120, rate=4e-3),
    TransformerTTSTask(Speech(length=96, count=16), steps=600, batch=16),
    SummaryTask(Summaries(length=32, sections=4, vocab=32), steps=400, batch=32,
                rate=4e-3, rows=8192, tests=64),
    SuperResolutionTask(Shapes(), steps=300),
    MaskedLMTask(Text(length=128), steps=400, rate=4e-3, rows=2048, tests=64),
    LMTask(Text(length=128), steps=250, rate=4e-3, rows=2048, tests=32),
    CompletionTask(Clouds(), steps=200, tests=64),
    ForecastTask(Series(length=48, horizon=24), steps=300, batch=16, rate=6e-3,
                 rows=4096, tests=192),
)
_TINY = {"steps": 2, "batch": 2, "rows": 4, "tests": 3}
SMALL: tuple[Task, ...] = (
    FastSpeechTask(Speech(length=20, count=3), **_TINY),
    TransformerTTSTask(Speech(length=20, count=3), **_TINY),
    SummaryTask(Summaries(length=16, sections=2), **_TINY),
    SuperResolutionTask(Shapes(length=16), **_TINY),
    MaskedLMTask(Text(length=16), **_TINY),
    LMTask(Text(length=16), **_TINY),
    CompletionTask(Clouds(length=24, missing=8), **_TINY),
    ForecastTask(Series(length=16, horizon=8), **_TINY),
)
NAMES = tuple(task.name for task in FULL)
# of a task of the benchmark the networks that it is judged by
TASKS = {"TTS": ("speech", "speech_ar"), "Sum": ("summary",), "SR": ("superres",),
         "MLM": ("mlm",), "LM": ("lm",), "PCC": ("clouds",), "LSTF": ("series",)}
