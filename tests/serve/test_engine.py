# SPDX-License-Identifier: Apache-2.0
"""The engine: answers written together are the ones that are written alone, and each fails, ends and is cut alone."""

import threading
from collections.abc import Iterator

import pytest
import torch
from listeners import DEADLINE, QUESTIONS, Listener, asks
from memories import make_frames

from hourllava import VideoMemory
from hourllava.errors import BusyError, InputError, QuestionError
from hourllava.model import AskOptions, HourLlavaForConditionalGeneration, Prepared, prepare
from hourllava.serve import Began, Ended, Engine, Event, Failed, Sampling, Ticket, Written
from hourllava.serve.batch import DecodingBatch


@pytest.fixture(scope="module")
def memory(model: HourLlavaForConditionalGeneration) -> VideoMemory:
    return model.watch(make_frames(20), progress=False)


@pytest.fixture
def engine(model: HourLlavaForConditionalGeneration) -> Iterator[Engine]:
    engine = Engine(model, max_batch=3)
    yield engine
    engine.close()


def test_answers_written_together_are_those_written_alone(model, memory, engine) -> None:
    listeners = [Listener() for _ in QUESTIONS * 3]
    for number, listener in enumerate(listeners):
        most = 1 + 7 * number % 12  # they come and go
        engine.submit(asks(model, memory, QUESTIONS[number % 4]), Sampling(most), listener)
    for number, listener in enumerate(listeners):
        most = 1 + 7 * number % 12
        alone = model.ask(memory, QUESTIONS[number % 4], max_new_tokens=most)
        ended = listener.last
        assert isinstance(ended, Ended)
        assert listener.text == alone.text
        began = listener.events[0]
        assert isinstance(began, Began)
        assert began.mass is not None
        assert began.mass.equal(alone.mass)
        assert (ended.reason, ended.completion_tokens) == ("length", most)
    assert engine.counts() == (0, 0)


def test_answer_ends_at_the_end_token(model, memory, engine) -> None:
    with torch.no_grad():
        logits = DecodingBatch(model).add(asks(model, memory, QUESTIONS[0])().embeds)
    engine._end = int(logits.argmax())  # as if the model had learnt to end there
    listener = Listener()
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(), listener)
    assert listener.last == Ended("stop", 0)
    assert listener.text == ""


def test_without_a_limit_the_decoder_ends(model, memory, engine, monkeypatch) -> None:
    listener = Listener()
    length = prepare(model, memory, QUESTIONS[0], AskOptions()).embeds.shape[1]
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", length + 20)
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(), listener)
    assert listener.last == Ended("length", 20)


def test_more_tokens_than_there_is_room_for(model, memory, engine, monkeypatch) -> None:
    length = prepare(model, memory, QUESTIONS[0], AskOptions()).embeds.shape[1]
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", length + 20)
    whole, refused = Listener(), Listener()
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(20), whole)
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(21), refused)
    assert whole.last == Ended("length", 20)
    failed = refused.last
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, InputError)
    why = f"21 are asked for, but beside the question's {length} the decoder has room for 20"
    assert str(failed.error) == f"max_tokens: {why}; ask for fewer, or leave it out"


def test_sampling_is_repeatable_by_its_seed(model, memory, engine) -> None:
    def sampled(seed: int | None, **sampling: float) -> str:
        listener = Listener()
        engine.submit(asks(model, memory, "What?"), Sampling(24, seed=seed, **sampling), listener)
        assert isinstance(listener.last, Ended)
        return listener.text

    assert sampled(1, temperature=1.5) == sampled(1, temperature=1.5)
    assert sampled(1, temperature=1.5) != sampled(2, temperature=1.5)
    assert sampled(None, temperature=2.0) != sampled(None, temperature=2.0)
    # What is left of a tiny part of the probability is the likeliest token.
    assert sampled(1, temperature=1.0, top_p=1e-6) == model.ask(memory, "What?", max_new_tokens=24).text


def test_a_question_fails_alone(model, memory, engine) -> None:
    def broken() -> Prepared:
        raise QuestionError("question", "it is broken", "mend it")

    good, bad, late = Listener(), Listener(), Listener()
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(12), good)
    engine.submit(broken, Sampling(), bad)
    engine.submit(asks(model, memory, QUESTIONS[1]), Sampling(6), late)
    failed = bad.last
    assert isinstance(failed, Failed)
    assert str(failed.error) == "question: it is broken; mend it"
    assert bad.events == [failed]
    assert good.last == Ended("length", 12)
    assert good.text == model.ask(memory, QUESTIONS[0], max_new_tokens=12).text
    assert late.last == Ended("length", 6)


def test_a_decoder_that_fails_ends_what_runs_and_no_more(model, memory, engine, monkeypatch, caplog) -> None:
    ready = threading.Event()
    forward, calls = model.model.forward, []

    def sometimes(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory, say")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", sometimes)
    first, second, after = Listener(), Listener(), Listener()
    engine.submit(lambda: (ready.wait(DEADLINE), asks(model, memory, "What?")())[1], Sampling(40), first)
    engine.submit(asks(model, memory, "Who?"), Sampling(40), second)
    ready.set()
    assert isinstance(first.last, Failed)
    assert isinstance(second.last, Failed)
    assert "an answer failed" in caplog.text
    engine.submit(asks(model, memory, "Why?"), Sampling(5), after)
    assert after.last == Ended("length", 5)
    assert after.text == model.ask(memory, "Why?", max_new_tokens=5).text


@pytest.mark.parametrize("fails_first", ["add", "keep"])
def test_a_batch_that_cannot_be_changed_ends_what_runs_and_no_more(
    fails_first: str, model, memory, engine, monkeypatch, caplog
) -> None:
    """As where there is no memory for the copy of what stays: also while a question that has failed is left out."""
    keep, ready, failing = DecodingBatch.keep, threading.Event(), [True]

    def fails(batch: DecodingBatch, rows: list[int]) -> None:
        if failing:
            raise RuntimeError("out of memory, say")
        keep(batch, rows)

    def broken() -> Prepared:
        raise QuestionError("question", "it is broken", "mend it")

    monkeypatch.setattr(DecodingBatch, "keep", fails)
    running, other, after = Listener(), Listener(), Listener()
    engine.submit(lambda: (ready.wait(DEADLINE), asks(model, memory, "What?")())[1], Sampling(40), running)
    if fails_first == "add":
        engine.submit(broken, Sampling(), other)
    else:
        engine.submit(asks(model, memory, "Who?"), Sampling(2), other)
    ready.set()
    assert isinstance(running.last, Failed)
    assert isinstance(running.last.error, RuntimeError)
    assert other.done.wait(DEADLINE)
    failing.clear()
    engine.submit(asks(model, memory, "Why?"), Sampling(5), after)
    assert after.last == Ended("length", 5)
    assert after.text == model.ask(memory, "Why?", max_new_tokens=5).text
    assert "an answer failed" in caplog.text


def test_cancelled_answers_end_and_make_room(model, memory, engine) -> None:
    tickets: list[Ticket] = []
    gate = threading.Event()

    def cut(event: Event) -> None:
        if isinstance(event, Written):
            gate.wait(DEADLINE)
            tickets[0].cancel()

    cancelled, waiting, other = Listener(hook=cut), Listener(), Listener()
    tickets.append(engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(400), cancelled))
    tickets.append(engine.submit(asks(model, memory, QUESTIONS[1]), Sampling(400), waiting))
    engine.submit(asks(model, memory, QUESTIONS[2]), Sampling(9), other)
    tickets[1].cancel()  # it has not begun: the first one holds up the engine
    gate.set()
    ended = cancelled.last
    assert isinstance(ended, Ended)
    assert ended.reason == "cancelled"
    assert ended.completion_tokens < 400
    assert waiting.last == Ended("cancelled", 0)
    assert waiting.events == [Ended("cancelled", 0)]
    assert other.last == Ended("length", 9)
    assert other.text == model.ask(memory, QUESTIONS[2], max_new_tokens=9).text


def test_too_many_questions_are_refused(model, memory) -> None:
    gate = threading.Event()
    engine = Engine(model, max_batch=1, max_waiting=2)
    held = Listener(hook=lambda event: gate.wait(DEADLINE))
    engine.submit(asks(model, memory, "What?"), Sampling(2), held)
    while engine.counts()[0]:  # until it is the one that is being answered
        pass
    rest = [Listener(), Listener()]
    for listener in rest:
        engine.submit(asks(model, memory, "What?"), Sampling(2), listener)
    with pytest.raises(BusyError, match="2 questions are waiting; ask again in a moment"):
        engine.submit(asks(model, memory, "What?"), Sampling(2), Listener())
    gate.set()
    assert [listener.last for listener in (held, *rest)] == [Ended("length", 2)] * 3
    engine.close()


def test_closing_ends_everything(model, memory) -> None:
    begun = threading.Event()
    engine = Engine(model, max_batch=1)
    running = Listener(hook=lambda event: begun.set() if isinstance(event, Written) else None)
    waiting = Listener()
    engine.submit(asks(model, memory, "What?"), Sampling(3000), running)
    engine.submit(asks(model, memory, "What?"), Sampling(3000), waiting)
    assert begun.wait(DEADLINE)
    engine.close()
    assert isinstance(running.last, Ended)
    assert running.last.reason == "cancelled"
    assert waiting.last == Ended("cancelled", 0)
    with pytest.raises(BusyError, match="it is being closed"):
        engine.submit(asks(model, memory, "What?"), Sampling(), Listener())
    assert not engine._thread.is_alive()


def test_a_listener_that_is_gone_ends_its_answer(model, memory, engine, caplog) -> None:
    def gone(event: Event) -> None:
        raise RuntimeError("closed loop")

    lost, other = Listener(hook=gone), Listener()
    engine.submit(asks(model, memory, "What?"), Sampling(400), lost)
    engine.submit(asks(model, memory, "Why?"), Sampling(8), other)
    assert other.last == Ended("length", 8)
    engine.close()
    reasons = [event.reason for event in lost.events if isinstance(event, Ended)]
    assert reasons == ["cancelled"]
    assert "nobody to go to" in caplog.text


def test_a_token_copies_no_keys(model, memory) -> None:
    batch = DecodingBatch(model)
    with torch.no_grad():
        for question in QUESTIONS[:2]:
            batch.add(asks(model, memory, question)().embeds)
        places = []
        for _ in range(70):  # more than there is room for at first
            batch.step(torch.tensor([7, 8]))
            places.append(batch._layers[0].keys.data_ptr())
    assert len(set(places)) == 2
