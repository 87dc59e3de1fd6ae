"""Wrong input as a stranger gives it: found before any work, said in one place, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tunesmith import pocket
from tunesmith.cli.main import main

ROWS = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} and {n + 1}"}]} for n in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(pocket.folder())
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def words(base, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(verb="train", base=base, out=tmp_path / "run", data=data, sets=()):
        short = ["--method", "sft", "--model", str(base), "--data", str(data), "--out", str(out), "--json"]
        return [verb, *short, *(word for value in ("run.samples=0", *sets) for word in ("--set", value))]

    return make


def failure(capsys, words):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return json.loads(out)["error"]


@pytest.mark.parametrize(
    ("value", "where", "said"),
    [
        ("run.epochs=true", "run.epochs", "a number is needed"),
        ("run.micro_tokens=true", "run.micro_tokens", "a number is needed"),
        ("optim.lr=inf", "optim.lr", "finite"),
        ("optim.betas=[2,3]", "optim.betas.0", "less than 1"),
        ("optim.lr=[1", "--set", "cannot be parsed"),
        ("model.base.x=3", "--set", "no settings below it"),
        ("data.train.0.wieght=2", "data.train.0.wieght", "did you mean 'weight'"),
        ("run.device=meta", "run.device", "not supported"),
        ("run.trackers=[trackio]", "run.trackers", "not installed"),
    ],
)
def test_a_wrong_value_is_refused_before_any_work(capsys, words, tmp_path, value, where, said):
    error = failure(capsys, words(sets=[value]))
    assert where in error["where"]
    assert said in error["message"]
    assert error["remedy"]
    assert not (tmp_path / "run").exists()


def test_a_word_that_stands_for_an_entry_is_kept_when_a_setting_below_it_is_set(capsys, base, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{base: {base}}}\ndata: {{train: rows.jsonl}}\nobjective: nll\nrun: {{checkpointing: on}}\n")
    for path in ("data.train.0.weight", "data.train.weight"):
        assert main(["train", str(recipe), "--print-recipe", "--set", f"{path}=2", "--set", "objective.0.weight=3"]) == 0
        out = capsys.readouterr().out
        assert '"path": "rows.jsonl"' in out
        assert '"weight": 2.0' in out
        assert '"name": "nll", "weight": 3.0' in out
        assert 'checkpointing: "on"' in out


def test_a_run_folder_where_nothing_can_be_written_is_refused_before_any_row_is_read(capsys, words, tmp_path, monkeypatch):
    def refuse(dir):  # what root meets below /proc, where os.access says yes
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("tunesmith.training.door.tempfile.mkdtemp", refuse)
    error = failure(capsys, words(out=tmp_path / "run"))
    assert (error["code"], error["where"]) == ("bad_out", "run.out")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_run_folder_that_is_a_file_is_refused(capsys, words, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    error = failure(capsys, words(out=tmp_path / "file" / below))
    assert (error["code"], error["where"]) == ("bad_out", "run.out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_base_without_weights_is_refused_before_rows_are_read(capsys, words, base, tmp_path):
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (hollow / path.name).write_bytes(path.read_bytes())
    error = failure(capsys, words(base=hollow, data=tmp_path / "nowhere.jsonl"))
    assert (error["code"], error["where"]) == ("no_weights", str(hollow))
    (hollow / "config.json").write_text("{")
    (hollow / "model.safetensors").write_bytes(b"")
    error = failure(capsys, words(base=hollow))
    assert error["code"] == "bad_model"
    assert "did you mean" not in error["message"]


def test_check_lists_what_train_would_refuse_one_after_the_other(capsys, words, tmp_path):
    (tmp_path / "file").write_text("")
    sets = ["run.device=meta", "run.trackers=[trackio]", "objective=dpoo"]
    assert main(words("check", out=tmp_path / "file", sets=sets)) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem["where"] for problem in problems] == ["objective.0", "run.device", "run.trackers", "run.out"]


def test_a_file_of_no_text_says_what_is_wrong_with_its_first_line(capsys, words, tmp_path):
    noise = tmp_path / "noise.jsonl"
    noise.write_bytes(bytes(range(128, 256)))
    error = failure(capsys, words(data=noise))
    assert error["where"] == f"{noise}:1"
    assert "not UTF-8" in error["message"]


def start(words):
    return subprocess.Popen([sys.executable, "-m", "tunesmith", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(capsys, words, tmp_path):
    run, command = tmp_path / "run", words(sets=["run.steps=3000", "run.save_every=1"])
    process = start(command)
    try:
        wait_for(lambda: any((run / "checkpoints").glob("step-*")), process)
        for more in ([], ["--fresh"]):
            error = failure(capsys, [*command, *more])
            assert error["code"] == "run_in_use"
            assert str(process.pid) in error["message"]
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert (run / ".lock").exists()
    error = failure(capsys, words(sets=["run.steps=2"]))
    assert error["code"] == "other_run"
    assert main([*words(sets=["run.steps=2", "run.save_every=1"]), "--fresh"]) == 0
    assert not (run / ".lock").exists()


def test_ctrl_c_before_the_first_step_ends_with_status_3_and_one_json_document(words):
    process = start(words(sets=["run.steps=100000"]))
    assert process.stderr.readline()  # the rows are being read
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 3
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert "Traceback" not in err


def test_a_reader_who_goes_away_is_no_error():
    process = subprocess.run(
        f"{sys.executable} -m tunesmith train --method sft --model pocket --data x --out y --set tokens.max_length=9 "
        "--print-recipe | true; exit ${PIPESTATUS[0]}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0
    assert process.stderr == ""


def test_stages_can_be_checked_before_the_first_is_trained(capsys, base, words, tmp_path):
    words()
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{base: {base}, adapter: {{}}}}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\nrun: {{out: {tmp_path / 'run'}}}\n"
        "stages:\n  - {name: one, model: {template: chatml}}\n  - {name: two, model: {base: '@one'}}\n"
    )
    assert main(["check", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)["stages"]
    assert two["recipe"]["model"]["base"] == str(tmp_path / "run/one/final")
    assert two["derived"]["template"] == one["derived"]["template"] == "named:chatml"


@pytest.mark.parametrize(("sets", "status"), [(["run.steps=2"], 0), (["run.steps=2", "objective=dpoo"], 1)])
def test_two_ranks_give_one_json_document(words, sets, status):
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tunesmith"]
    done = subprocess.run([sys.executable, *ranks, *words(sets=sets)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == status, done.stderr
    assert ("error" in json.loads(done.stdout)) == bool(status)


def test_a_cache_that_cannot_be_written_stops_no_run(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    assert main(words(sets=["run.steps=1"])) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_verify_says_no_to_cut_weights_and_to_a_missing_folder(words, tmp_path, capsys):
    assert main(words(sets=["run.steps=1"])) == 0
    capsys.readouterr()
    os.truncate(tmp_path / "run/final/adapter_model.safetensors", 100)
    assert main(["verify", str(tmp_path / "run"), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "final_unreadable"
    assert "changed since training: adapter_model.safetensors" in error["message"]
    shutil.rmtree(tmp_path / "run/final")
    assert main(["verify", str(tmp_path / "run"), "--json"]) == 1


def test_written_weights_are_as_readable_as_the_rest(words, tmp_path):
    mask = os.umask(0o022)
    try:
        assert main(words(sets=["run.steps=1"])) == 0
    finally:
        os.umask(mask)
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644, path
