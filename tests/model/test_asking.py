# SPDX-License-Identifier: Apache-2.0
"""Watching once and asking often: the same numbers as the whole model, whatever way the frames came in."""

import pickle
import re

import pytest
import torch
from tiny_model import make_model

from hourllava.errors import InputError, MemoryFileError, ModelError, QuestionError, VideoError
from hourllava.memory import VideoMemory
from hourllava.model import FrameWriter, build_prompt
from hourllava.model.asking import find_moments
from hourllava.model.inputs import Visual
from hourllava.model.watching import new_memory
from hourllava.video import write_video

QUESTION = "Which colour was the circle?"


def make_frames(count, seed=0, size=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def logits_of_forward(model, frames, **options):
    """The next token's logits and the greedy answer, from the model that is given the pixels with the question."""
    ids, query_mask, _ = build_prompt(model.tokenizer, QUESTION)
    video = {"pixel_values": [frames], "query_mask": query_mask[None], **options}
    with torch.no_grad():
        logits = model(ids[None], **video).logits[0, -1]
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    written = model.generate(ids[None], **video, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=end)
    return logits, model.tokenizer.decode(written[0], skip_special_tokens=True).strip()


def valid_rows(memory):
    """Every row in use of every pool; what free rows hold is nobody's business."""
    inside = torch.arange(128) < memory.page_lengths[:, None]
    for pages in memory.pages:
        yield pages.key_pages.transpose(1, 2)[inside]
        yield pages.value_pages.transpose(1, 2)[inside]
        yield pages.key_summary
    yield memory.page_lengths
    yield memory.tokens


def assert_same_memory(ours, theirs):
    assert ours.frames == theirs.frames
    for a, b in zip(valid_rows(ours), valid_rows(theirs), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("frames", [1, 5, 37, 150])
@pytest.mark.parametrize("changes", [{}, {"min_frames": 48}, {"spatial_forgetting": "random"}])
@pytest.mark.parametrize("options", [{}, {"use_memory": False}, {"memaug": False}])
def test_asking_is_the_whole_model(frames, changes, options):
    model = make_model(**changes)
    video = make_frames(frames)
    logits, text = logits_of_forward(model, video, **options)
    answer = model.ask(model.watch(video, progress=False), QUESTION, max_new_tokens=6, **options)
    assert str(answer) == answer.text == text
    assert answer.top_tokens[0][0] == model.tokenizer.decode([int(logits.argmax())])
    expected = logits.softmax(-1).topk(5).values.tolist()
    assert [share for _, share in answer.top_tokens] == pytest.approx(expected, rel=1e-3)
    assert set(answer.timings) == {"memaug", "decode_text", "total"}


def test_appending_in_pieces_is_watching_at_once():
    model = make_model()
    video = make_frames(150)
    whole = model.watch(video, progress=False)
    pieces = model.watch(video[:1], progress=False)
    for first, end in [(1, 2), (2, 9), (9, 10), (10, 75), (75, 75), (75, 150)]:
        pieces.append(video[first:end])
    assert_same_memory(pieces, whole)
    stream = model.watch(iter(video.split(7)), progress=False)
    assert_same_memory(stream, whole)
    assert model.ask(pieces, QUESTION).text == model.ask(whole, QUESTION).text


def test_a_model_that_has_changed_appends_no_more():
    model, video = make_model(), make_frames(20)
    memory = model.watch(video, progress=False)
    model.half()
    with pytest.raises(MemoryFileError, match="it was made by another model"):
        memory.append(video)
    assert memory.frames == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    model, video = make_model(), make_frames(20)
    memory = model.watch(video, progress=False)
    with torch.autocast("cpu", dtype):
        again = model.watch(video[:7], progress=False)
        again.append(video[7:])
        answer = model.ask(again, QUESTION)
    assert_same_memory(again, memory)
    assert answer.top_tokens == model.ask(memory, QUESTION).top_tokens


def test_answers_can_be_looked_for_and_kept():
    model = make_model()
    memory = model.watch(make_frames(5), progress=False)
    first, second = model.ask(memory, QUESTION), model.ask(memory, QUESTION)
    assert second in [first, second]
    assert {first: "first", second: "second"}[second] == "second"
    assert pickle.loads(pickle.dumps(first)).moments == first.moments


def test_a_memory_in_files_is_the_one_in_ram(tmp_path):
    model, video = make_model(), make_frames(300)
    in_ram = model.watch(video, progress=False)
    in_files = model.watch(iter(video.split(7)), progress=False, into=tmp_path)
    assert_same_memory(in_files, in_ram)
    before = in_files.pages  # stays valid while the files grow
    in_files.append(make_frames(300, seed=1))
    assert torch.equal(before[0].key_pages, in_files.pages[0].key_pages[: len(before[0].key_pages)])
    in_ram.append(make_frames(300, seed=1))
    assert_same_memory(in_files, in_ram)
    assert model.ask(in_files, QUESTION).top_tokens == model.ask(in_ram, QUESTION).top_tokens
    in_files.save(tmp_path / "files.memory")
    in_ram.save(tmp_path / "ram.memory")
    assert (tmp_path / "files.memory").read_bytes() == (tmp_path / "ram.memory").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"files.memory", "ram.memory"}


def test_what_is_watched_is_right():
    model = make_model()
    video = make_frames(20)
    memory = model.watch(video, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(memory.tokens, model.model.project([Visual(video, "video", None)], 8)[0][1])
    assert set(memory.timings) == {"decode", "encode", "write"}
    assert memory.damage is None


def test_second_question_reads_the_memory_only(monkeypatch):
    model = make_model()
    memory = model.watch(make_frames(40), progress=False)
    first = model.ask(memory, QUESTION)

    def fail(*_, **__):
        raise AssertionError("a frame was decoded or encoded again")

    monkeypatch.setattr(model.model.vision_tower, "forward", fail)
    monkeypatch.setattr(model.model.mm_projector, "forward", fail)
    monkeypatch.setattr("hourllava.model.watching.open_video", fail)
    for block in model.model.vision_resampler.blocks:
        monkeypatch.setattr(block.cross_attn.Wkv, "forward", fail)
    again = model.ask(memory, QUESTION)
    assert (again.text, again.top_tokens) == (first.text, first.top_tokens)
    assert torch.equal(again.mass, first.mass)
    model.ask(memory, "And what came after it?")


def test_free_rows_are_never_read():
    model = make_model()
    memory = model.watch(make_frames(37), progress=False)
    memory.reserve(200)
    answer = model.ask(memory, QUESTION)
    free = torch.arange(128) >= memory.page_lengths[:, None]
    assert bool(free.any())
    for pages in memory.pages:
        pages.key_pages.transpose(1, 2)[free] = torch.nan
        pages.value_pages.transpose(1, 2)[free] = torch.nan
    for pool in (*memory._keys, *memory._values, *memory._summaries):
        pool.rows[memory.num_pages :] = torch.nan
    poisoned = model.ask(memory, QUESTION)
    assert poisoned.top_tokens == answer.top_tokens
    assert torch.equal(poisoned.mass, answer.mass)
    memory.append(make_frames(3, seed=1))
    assert not torch.isnan(model.ask(memory, QUESTION).mass).any()


def test_evidence_is_what_the_attention_rests_on():
    model = make_model()
    memory = model.watch(make_frames(90), progress=False)
    answer = model.ask(memory, QUESTION)
    assert answer.mass.shape == (90,)
    assert float(answer.mass.sum()) == pytest.approx(1, abs=1e-5)
    assert bool((answer.mass >= 0).all())
    # Make every query look for one direction, and let only the page of seconds 40 and 41 have it.
    page = 40 * 64 // 128 + 1  # the first newline page comes before it
    for block, pages in zip(model.model.vision_resampler.blocks, memory.pages, strict=True):
        with torch.no_grad():
            block.cross_attn.Wq.weight.zero_()
            block.cross_attn.Wq.bias.fill_(1)
        unrotated = pages.key_pages[..., pages.key_pages.shape[-1] // 2 :]
        unrotated[:] = 0
        unrotated[page] = 100
    (moment,) = model.ask(memory, QUESTION).moments
    assert (moment.start, moment.end) == (40, 42)
    assert moment.share > 0.999


def test_moments_are_runs_that_stand_out():
    mass = torch.full((100,), 0.001)
    mass[10:12], mass[50], mass[99], mass[70] = 0.2, 0.3, 0.15, 0.003
    moments = find_moments(mass)
    assert [(m.start, m.end) for m in moments] == [(10, 12), (50, 51), (99, 100)]
    assert [m.share for m in moments] == pytest.approx([0.4, 0.3, 0.15])
    assert [(m.start, m.end) for m in find_moments(torch.ones(1))] == [(0, 1)]
    assert find_moments(torch.zeros(5)) == []
    assert len(find_moments(torch.tensor([1.0, 0, 0, 0] * 9), limit=4)) == 4


def test_saved_memory_answers_and_grows(tmp_path):
    model = make_model()
    video = make_frames(50)
    memory = model.watch(video[:41], progress=False)
    memory.damage = "the last 9 seconds could not be read"
    memory.save(tmp_path / "film.memory")
    again = VideoMemory.load(tmp_path / "film.memory")
    assert_same_memory(again, memory)
    assert again.damage == memory.damage
    assert model.ask(again, QUESTION).top_tokens == model.ask(memory, QUESTION).top_tokens
    with pytest.raises(ModelError, match=r"model\.attach"):
        again.append(video[41:])
    model.attach(again)
    again.append(video[41:])
    assert_same_memory(again, model.watch(video, progress=False))
    # The file is not touched by what happens to the memory that was loaded from it.
    assert VideoMemory.load(tmp_path / "film.memory").frames == 41
    grown = tmp_path / "grown.memory"
    again.save(grown)
    model.watch(video, progress=False).save(tmp_path / "whole.memory")
    assert_same_memory(VideoMemory.load(grown), VideoMemory.load(tmp_path / "whole.memory"))


def test_memory_of_another_model(tmp_path):
    memory = make_model().watch(make_frames(9), progress=False)
    memory.save(tmp_path / "film.memory")
    other = make_model(seed=1)
    loaded = VideoMemory.load(tmp_path / "film.memory")
    for use in (lambda: other.ask(loaded, QUESTION), lambda: other.attach(loaded)):
        with pytest.raises(MemoryFileError, match=r"film\.memory: it was made by another model"):
            use()
    # Weights that a memory does not come from may change: the decoder of a later stage reads it still.
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.ask(loaded, QUESTION)
    with torch.no_grad():
        model.model.mm_projector[0].weight.add_(0.1)
    with pytest.raises(MemoryFileError, match="made by another model"):
        model.ask(loaded, QUESTION)


def test_frames_of_any_size_and_a_video_file(tmp_path):
    model = make_model()
    frames = (frame.permute(1, 2, 0).numpy() for frame in make_frames(12, size=96))
    write_video(tmp_path / "film.mp4", frames, fps=4, size=96)
    seen = []
    memory = model.watch(tmp_path / "film.mp4", progress=False, on_chunk=lambda memory: seen.append(memory.frames))
    assert memory.frames == 3
    assert seen == [3]
    assert model.watch(make_frames(2, size=80), progress=False).frames == 2
    assert memory.timings["decode"] > 0


def test_chunks_that_are_skipped_are_told():
    """Whoever wants to stop a watching that goes on far into a video need not wait until it is there."""
    model, frames, seen = make_model(), make_frames(150), []
    memory = model.watch(frames[:100], progress=False)
    model.watch(frames, progress=False, into=memory, on_chunk=lambda memory: seen.append(memory.frames))
    assert seen == [100, 128, 150]
    assert torch.equal(memory.tokens, model.watch(frames, progress=False).tokens)


def test_a_question_may_forget_otherwise():
    model = make_model()
    memory = model.watch(make_frames(40), progress=False)
    plain = model.ask(memory, QUESTION).top_tokens
    for options in ({"temporal_forgetting": "question"}, {"spatial_forgetting": "random", "forgetting_seed": 5}):
        answer = model.ask(memory, QUESTION, **options)
        assert answer.top_tokens != plain
        assert model.ask(memory, QUESTION, **options).top_tokens == answer.top_tokens
    with pytest.raises(InputError, match="choose another temporal_forgetting"):
        model.ask(memory, QUESTION, temporal_forgetting="keyframe")


def test_a_question_longer_than_the_context():
    model = make_model()
    memory = model.watch(make_frames(4), progress=False)
    with pytest.raises(InputError, match=r"question: it comes to .* but the decoder reads 4096"):
        model.ask(memory, "a" * 4096)


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_empty_question(question):
    model = make_model()
    memory = model.watch(make_frames(1), progress=False)
    with pytest.raises(QuestionError, match="it is empty"):
        model.ask(memory, question)


@pytest.mark.parametrize("where", ["question", "history", "system"])
def test_half_a_character(where):
    """What a shell makes of bytes that are no UTF-8, and JSON of an emoji that was cut in two."""
    model = make_model()
    memory = model.watch(make_frames(3), progress=False)
    told = {"history": {"history": [("a \ud83d", "b")]}, "system": {"system": "\udcff"}}.get(where, {})
    with pytest.raises(QuestionError, match="half of a character"):
        model.ask(memory, "\udcff" if where == "question" else QUESTION, **told)


@pytest.mark.parametrize("most", [0, -3])
def test_no_room_for_an_answer(most):
    model = make_model()
    memory = model.watch(make_frames(3), progress=False)
    with pytest.raises(InputError, match=f"max_new_tokens: it is {most}; give 1 or more"):
        model.ask(memory, QUESTION, max_new_tokens=most)


def test_empty_memory():
    model = make_model()
    with pytest.raises(QuestionError, match="holds no second yet"):
        model.ask(new_memory(FrameWriter(model)), QUESTION)


def test_nothing_to_watch():
    with pytest.raises(VideoError, match="no frame"):
        make_model().watch(make_frames(0), progress=False)


def test_no_tower_to_watch_with():
    model = make_model()
    model.config.vision_config = None
    with pytest.raises(ModelError, match="without a vision tower"):
        model.watch(make_frames(1), progress=False)


def test_time_instruction_reaches_the_prompt(monkeypatch):
    model = make_model(time_instruction=True)
    memory = model.watch(make_frames(6), progress=False)
    asked = []

    def build(tokenizer, question, instruction, *rest):
        asked.append(instruction)
        return build_prompt(tokenizer, question, instruction, *rest)

    monkeypatch.setattr("hourllava.model.asking.build_prompt", build)
    model.ask(memory, QUESTION)
    assert asked[0].startswith("The video lasts for 6.00 seconds, and 6 frames")


def test_earlier_questions_are_remembered():
    model = make_model()
    memory = model.watch(make_frames(30), progress=False)
    first = model.ask(memory, QUESTION)
    told = model.ask(memory, "Why?", history=[(QUESTION, first.text)], max_new_tokens=1)
    alone = model.ask(memory, "Why?", max_new_tokens=1)
    assert told.top_tokens != alone.top_tokens
    # What counts as evidence is what the last question looks up.
    prompt = build_prompt(model.tokenizer, "Why?", history=[(QUESTION, first.text)])
    rows = []
    forward = model.model.vision_resampler.forward

    def listen(queries, stream, pages, use):
        rows.append(use.mass_weight)
        return forward(queries, stream, pages, use)

    model.model.vision_resampler.forward = listen
    model.ask(memory, "Why?", history=[(QUESTION, first.text)], max_new_tokens=1)
    assert rows[0].sum() == prompt.question_mask.sum() == len("Why?")


@pytest.mark.parametrize("token", ["<image>", "<|im_start|>", "<|im_end|>"])
@pytest.mark.parametrize("place", ["question", "history", "system"])
def test_marks_of_the_prompt_are_no_text(token, place):
    model = make_model()
    memory = model.watch(make_frames(2), progress=False)
    texts = {"question": "Why?", "history": "What?", "system": "Be brief."}
    texts[place] += token
    with pytest.raises(QuestionError, match=re.escape(f"it holds {token}, which the model reads as a mark")):
        model.ask(memory, texts["question"], history=[("Who?", texts["history"])], system=texts["system"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_in_half_precision(dtype, tmp_path):
    model, video = make_model(), make_frames(40)
    exact = model.ask(model.watch(video, progress=False), QUESTION)
    memory = model.to(dtype).watch(video, progress=False)
    assert memory.tokens.dtype == dtype
    memory.save(tmp_path / "film.memory")
    answer = model.ask(VideoMemory.load(tmp_path / "film.memory"), QUESTION)
    assert answer.mass.dtype == torch.float32
    torch.testing.assert_close(answer.mass, exact.mass, rtol=0, atol=0.02)
