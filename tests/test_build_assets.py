"""The recipe for the bundle: its parts against plain loops, and the whole of it on a small made-up data set."""

import json
import math
import random
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="needs the datasets extra: pip install 'tokenmdp[datasets]'")
import pyarrow as pa
import pyarrow.parquet
from imdb_recipe import corpus, gold, language_model, quality, reward_model
from test_ppo import timeless
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

from tokenmdp.files import CheckpointError, save_state
from tokenmdp.preferences import Demonstration

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "build_imdb_assets.py"
CPU = torch.device("cpu")


def tiny_classifier(**extra) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2, pad_token_id=1, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4, **extra,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config).eval()


def test_clean_turns_runs_of_breaks_into_one_newline():
    assert corpus.clean(" One. <br /><br />Two.<br/> Three <b>") == "One.\nTwo.\nThree <b>"


def test_token_batches_hold_every_row_once_within_the_budget():
    rng = random.Random(0)
    lengths = [rng.randint(1, 30) for _ in range(200)]
    batches = corpus.token_batches(lengths, tokens=90, rng=rng)
    assert all(len(batch) * max(lengths[row] for row in batch) <= 90 for batch in batches)
    assert sorted(row for batch in batches for row in batch) == list(range(200))


def made_up_texts():
    """A tokenizer, and rows that it reads."""
    rng = random.Random(0)
    words = ["film", "plot", "great", "dull", "was", "the", "a", "and"]
    texts = [" ".join(rng.choice(words) for _ in range(rng.randint(5, 30))) for _ in range(120)]
    tokenizer = corpus.train_tokenizer(texts, vocab_size=300)
    reviews = corpus.encode(tokenizer, texts)
    return tokenizer, corpus.language_model_rows(reviews, tokenizer.eos_token_id, 64, random.Random(1))


def tiny_lm(tokenizer):
    torch.manual_seed(0)
    return GPT2LMHeadModel(language_model.gpt2_config(tokenizer, width=32, layers=1, heads=2))


@pytest.fixture
def pretraining(tmp_path):
    """Makes a learner on the made-up texts; the checkpoint, if there is one, is continued."""
    tokenizer, rows = made_up_texts()
    texts = [Demonstration(prompt_ids=tuple(row[:1]), response_ids=tuple(row[1:])) for row in rows]
    config = language_model.PretrainingConfig(dtype="float32", device="cpu", batch_tokens=400, total_updates=20)

    def make():
        if (tmp_path / "run").exists():
            return language_model.Pretraining.load(tmp_path / "run", texts)
        return language_model.Pretraining(tiny_lm(tokenizer), texts, config, tokenizer=tokenizer)

    return make


def test_pretraining_takes_the_steps_of_a_plain_loop(pretraining):
    learner = pretraining()
    model = tiny_lm(learner.tokenizer)
    optimizer, pad = language_model.MuonWithAdamW(model, 3e-3), learner.tokenizer.pad_token_id
    losses = []
    for step in range(20):
        rows = [[*learner.examples[row].prompt, *learner.examples[row].responses[0]] for row in learner._batch(step)]
        batch = corpus.pad_rows(rows, pad)
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=pad)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.set_learning_rate(3e-3 * language_model.schedule(step / 20))
        optimizer.step()
        losses.append(loss.item())
    found = [metrics["loss"] for metrics in learner.learn(20).history]
    assert found == pytest.approx(losses, abs=2e-3)
    assert found[-1] < found[0] - 0.5
    assert learner.history[-1]["epoch"] > 1  # so a second pass over the texts has begun


def test_every_pass_of_pretraining_is_made_once(pretraining, monkeypatch):
    learner = pretraining()
    every = [rows for epoch in range(4) for rows in learner.batches(epoch)]
    assert learner.updates_per_epoch < len(every) / 3
    asked, batches = [], learner.batches
    monkeypatch.setattr(learner, "batches", lambda epoch: asked.append(epoch) or batches(epoch))
    assert [learner._batch(update).tolist() for update in range(len(every))] == every
    assert asked == [0, 1, 2, 3]
    assert learner._batch(1).tolist() == every[1]  # an earlier one, too


def test_pretraining_resumes_bit_for_bit(pretraining, tmp_path):
    unbroken, begun = pretraining().learn(12), pretraining().learn(7)
    begun.save(tmp_path / "run")
    resumed = pretraining().learn(5)
    assert timeless(resumed.history) == timeless(unbroken.history)
    weights = unbroken.policy.lm.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.policy.lm.state_dict().items())


def test_work_of_other_numbers_and_earlier_recipes_is_refused(tmp_path):
    tokenizer, rows = made_up_texts()

    def pretrain(**changes):
        numbers = {"tokens": 100, "batch_tokens": 400, "learning_rate": 3e-3, "seed": 1} | changes
        language_model.pretrain(
            tiny_lm(tokenizer), tokenizer, rows, checkpoint=tmp_path / "run", device=CPU, log=print, **numbers
        )

    pretrain()
    pretrain()  # goes on, where nothing is left to do
    for change, words in (
        ({"learning_rate": 0.01}, r"learning_rate 0\.003, asked 0\.01"),
        ({"batch_tokens": 300}, "batch_tokens 400, asked 300"),
        ({"tokens": 2000}, r"total_updates \d, asked \d+; .*another --work"),
    ):
        with pytest.raises(CheckpointError, match=words):
            pretrain(**change)
    file = tmp_path / "state.safetensors"
    save_state(file, {"model": {}, "optimizers": [], "step": 1})
    with pytest.raises(CheckpointError, match=r"state\.safetensors is that of an earlier recipe; delete it"):
        reward_model.train_steps(tiny_lm(tokenizer), file, 2, 1e-3, None, print)


def test_long_reviews_continue_in_further_rows():
    rows = corpus.language_model_rows([list(range(2, 28))], eos=0, positions=16, rng=random.Random(1))
    assert [token for row in rows for token in row if token] == list(range(2, 28))
    assert rows[-1][-1] == 0


def test_leave_one_out_equals_a_plain_loop():
    model, rng = tiny_classifier(), random.Random(0)
    texts = [[rng.randrange(2, 40) for _ in range(rng.randint(2, 12))] for _ in range(9)]

    def score(text):
        logits = model(torch.tensor([text])).logits[0]
        return (logits[1] - logits[0]).item()

    grouped = reward_model.leave_one_out(model, texts, CPU, slots=300)
    assert len(grouped) == len(texts)
    for text, importance in zip(texts, grouped, strict=True):
        expected = [abs(score(text) - score(text[:t] + text[t + 1 :])) for t in range(len(text))]
        torch.testing.assert_close(importance, torch.tensor(expected), atol=0.05, rtol=0.05)  # bf16 autocast


def test_scores_of_grouped_rows_equal_single_ones():
    model, rng = tiny_classifier(), random.Random(0)
    rows = [[rng.randrange(2, 40) for _ in range(rng.randint(1, 20))] for _ in range(30)]
    logits = torch.stack([model(torch.tensor([row])).logits[0].detach() for row in rows])
    expected = (logits[:, 1] - logits[:, 0]).numpy()
    assert quality.scores(model, rows, CPU, bf16=False) == pytest.approx(expected, abs=1e-5)
    labels = [index % 2 for index in range(30)]
    share = sum((score > 0) == label for score, label in zip(expected, labels, strict=True)) / 30
    assert quality.accuracy(model, rows, labels, CPU) == pytest.approx(share, abs=1 / 30)  # bf16 autocast


def test_a_model_agrees_with_itself():
    model = tiny_classifier()
    found = quality.agreement(model, model, [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]], CPU)
    assert found["pearson"] == pytest.approx(1)
    assert found["spearman"] == pytest.approx(1)
    assert found["score_std"][0] == found["score_std"][1]


def test_gold_classifier_keeps_the_backbone_of_its_language_model():
    tokenizer = corpus.train_tokenizer(["a fine film", "a bad film"], vocab_size=270)
    torch.manual_seed(0)
    model = LlamaForCausalLM(gold.llama_config(tokenizer, width=24, layers=2, heads=3)).eval()
    classifier, batch = gold.from_language_model(model).eval(), torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(classifier.model(batch).last_hidden_state, model.model(batch).last_hidden_state)
    assert classifier(batch).logits.shape == (1, 2)
    assert classifier.config.pad_token_id != classifier.config.eos_token_id


def test_row_equals_eager_attention():
    model = tiny_classifier(attn_implementation="eager")
    texts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    batch, lengths = corpus.pad_rows(texts, 1), torch.tensor([5, 3])
    with torch.no_grad():
        _, row = reward_model.scores_and_row(model, batch, lengths)
        for index, text in enumerate(texts):
            eager = model(torch.tensor([text]), output_attentions=True).attentions[-1][0, :, -1].mean(0)
            torch.testing.assert_close(row[index, : len(text)], eager, atol=0.01, rtol=0.0)  # bf16 autocast
            assert row[index, len(text) :].sum() == 0


def test_bits_per_byte_equals_a_plain_loop(tmp_path):
    texts = ["a fine film", "bad", "so so so"]
    tokenizer = corpus.train_tokenizer(texts * 3, vocab_size=270)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=8, n_embd=16, n_layer=1, n_head=1, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=0, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model, nats = GPT2LMHeadModel(config).eval(), 0.0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, 7):  # 8 positions, one of overlap
            row = torch.tensor([ids[start : start + 8]])
            logprobs = model(row[:, :-1]).logits.log_softmax(-1)
            nats -= logprobs.gather(-1, row[:, 1:, None]).sum().item()
    expected = nats / math.log(2) / sum(map(len, texts))
    assert quality.bits_per_byte(model, tokenizer, texts, CPU) == pytest.approx(expected, rel=5e-3)


def write_reviews(folder: Path) -> None:
    rng = random.Random(0)
    tone = (["awful", "boring", "terrible", "dull", "poor"], ["great", "wonderful", "superb", "lovely", "brilliant"])
    filler = re.findall(r"\w+", "the movie was a film with plot and actors in this scene that we saw it is of")
    for split, count in (("train", 100), ("test", 30), ("unsupervised", 60)):
        rows = {"text": [], "label": []}
        for index in range(count):
            words = [rng.choice(tone[index % 2] if rng.random() < 0.2 else filler) for _ in range(rng.randint(30, 90))]
            rows["text"].append(" ".join(words) + f".<br /><br />End {split} {index}")
            rows["label"].append(index % 2)
        pa.parquet.write_table(pa.table(rows), folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.long
def test_whole_recipe_on_made_up_reviews(tmp_path, monkeypatch, capsys):
    write_reviews(tmp_path)
    sizes = "--vocab-size 300 --width 32 --layers 2 --heads 2 --policy-tokens 4e3 --classify-steps 2 "
    sizes += "--align-steps 2 --uniform-steps 2 --gold-width 32 --gold-heads 2 --gold-tokens 4e3 --gold-steps 2 "
    sizes += "--openings 150 --written 30"
    bundle = tmp_path / "bundle"

    def build(*options):
        paths = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--bundle", str(bundle)]
        paths += ["--study-models", str(tmp_path)]
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *paths, "--device", "cpu", *sizes.split(), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    build()
    places = {
        "plain": tmp_path / "imdb-plain",
        "uniform": tmp_path / "imdb-uniform",
        "gold": bundle / "reward_model_gold",
    }
    weights = [places[part] / "model.safetensors" for part in ("gold", "uniform")]
    before = [file.read_bytes() for file in weights]
    work = [*(tmp_path / "work").glob("*gold*"), *(tmp_path / "work").glob("*uniform*")]
    for built in [*(file.parent for file in weights), *work]:
        shutil.rmtree(built) if built.is_dir() else built.unlink()
    build("--gold", "--uniform")
    assert [file.read_bytes() for file in weights] == before
    report = build("--evaluate")
    figures = json.loads(report[report.index("{\n") :])
    assert 0 < figures["bits_per_byte"] < 8
    assert f"{figures['bits_per_byte']:.3f}" in (bundle / "README.md").read_text()
    for part, name in (("plain", "GPT2"), ("uniform", "GPT2"), ("gold", "Llama")):
        assert json.loads((places[part] / "config.json").read_text())["architectures"] == [
            f"{name}ForSequenceClassification"
        ]
        assert 0 <= figures[part]["accuracy_24"] <= 1
        assert -1 <= figures[part]["pearson_95"][0] <= figures[part]["pearson"] <= figures[part]["pearson_95"][1] <= 1
    tokenizer = AutoTokenizer.from_pretrained(bundle / "reward_model")
    assert tokenizer.decode(tokenizer.encode("Café\n ☃")) == "Café\n ☃"
    assert len(tokenizer) == GPT2LMHeadModel.from_pretrained(bundle / "policy").config.vocab_size == 300
    assert GPT2ForSequenceClassification.from_pretrained(bundle / "reward_model").config.num_labels == 2
    assert json.loads((bundle / "prompts.json").read_text())["prompts"]
