"""The command's options: where they come from, which wins, and what is refused before anything starts."""

from __future__ import annotations

import functools
import json
import os
import socket
import stat
import subprocess
import sys
import textwrap

import pytest
from fastapi import HTTPException

from slipstream.commands import vllm_serve
from slipstream.serving import shared_file
from slipstream.serving.replicas import device_slices
from slipstream.serving.settings import Settings
from slipstream.serving.shared_file import SharedFile, SharedFiles, remove_abandoned


@pytest.fixture(autouse=True, scope="module")
def without_model(tmp_path_factory):
    """A server whose model is not there, and where; to import vLLM takes it seconds."""
    folder = tmp_path_factory.mktemp("none")
    (folder / "none").mkdir()
    started = start("--model", folder / "none", "--host", "127.0.0.1", "--port", 0, env={"XDG_STATE_HOME": str(folder)})
    yield started, folder
    started.kill()


@pytest.fixture(autouse=True, scope="module")
def one_question_to_vllm():
    """Its options are asked of a process of its own, which takes as long: once is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_serve, "engine_option_names", functools.cache(vllm_serve.engine_option_names))
        yield


def start(*words, env=None):
    return subprocess.Popen(
        [sys.executable, "-m", "slipstream", "vllm-serve", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})},
    )  # fmt: skip


def run(*words, env=None):
    process = start(*words, env=env)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def settings(*words, config=None):
    """What the command makes of its words, without serving."""
    found = []
    command = vllm_serve.Command("vllm-serve", params=[], context_settings=vllm_serve.CONTEXT)
    import typer

    app = typer.Typer()

    def noted(context: typer.Context, **given):
        config = given.pop("config")
        found.append(vllm_serve.read(config, {k: v for k, v in given.items() if v is not None}, context.args))

    made = vllm_serve.command()
    noted.__signature__, noted.__annotations__ = made.__signature__, made.__annotations__
    app.command(cls=type(command), context_settings=vllm_serve.CONTEXT)(noted)
    app([*map(str, words)], standalone_mode=False)
    return found[0]


class TestOptions:
    def test_dashes_and_underscores(self):
        made = settings("--model", "m", "--max-model-len", 7, "--gpu_memory_utilization=0.5", "--enforce_eager")
        assert (made.max_model_len, made.gpu_memory_utilization, made.enforce_eager) == (7, 0.5, True)

    @pytest.mark.parametrize(
        ("words", "value"),
        [
            (["--enable-prefix-caching"], True), (["--enable_prefix_caching", "True"], True),
            (["--enable-prefix-caching=false"], False), (["--no-enable-prefix-caching"], False), ([], None),
        ],
    )  # fmt: skip
    def test_switches(self, words, value):
        assert settings("--model", "m", *words).enable_prefix_caching is value

    def test_the_command_line_wins_over_the_file(self, tmp_path):
        file = tmp_path / "serve.yaml"
        file.write_text("model: one\nport: 7000\ntensor-parallel-size: 2\nspeculative_config: {method: ngram}\n")
        made = settings("--config", file, "--port", 0)
        assert (made.model, made.port, made.tensor_parallel_size) == ("one", 0, 2)
        assert made.engine()["speculative_config"] == {"method": "ngram"}

    def test_defaults_are_the_documented_ones(self):
        made = settings("--model", "m")
        assert (made.host, made.port, made.gpu_memory_utilization, made.dtype, made.workers) == (
            "0.0.0.0", 8000, 0.9, "auto", 1,
        )  # fmt: skip
        assert made.engine() == {
            "model": "m", "tensor_parallel_size": 1, "gpu_memory_utilization": 0.9, "dtype": "auto",
            "enforce_eager": False, "kv_cache_dtype": "auto", "trust_remote_code": False, "model_impl": "vllm",
        }  # fmt: skip

    def test_a_value_that_is_no_yaml_is_one_line(self, tmp_path):
        with pytest.raises(ValueError, match=r"--seed '\{\{ messages \}\}x' cannot be read as YAML"):
            settings("--model", "m", "--seed", "{{ messages }}x")
        file = tmp_path / "serve.yaml"
        file.write_text("model: {")
        with pytest.raises(ValueError, match=r"serve\.yaml is not YAML"):
            settings("--config", file)

    def test_what_only_offline_engines_take_is_unknown(self):
        with pytest.raises(ValueError, match="chat_template"):
            settings("--model", "m", "--chat-template", "x")

    def test_what_the_engine_knows_is_passed_on(self):
        made = settings("--model", "m", "--max_num_seqs", 8, "--no-enable-chunked-prefill", "--seed=3")
        assert made.engine_options == {"max_num_seqs": 8, "enable_chunked_prefill": False, "seed": 3}
        assert made.engine()["seed"] == 3

    def test_vllms_short_names(self):
        made = settings("-tp", 2, "--model", "m", "-dp=3", "-pp", 2, "-q=fp8")
        assert (made.tensor_parallel_size, made.data_parallel_size) == (2, 3)
        assert made.engine_options == {"pipeline_parallel_size": 2, "quantization": "fp8"}

    def test_parts_of_a_mapping(self, tmp_path):
        file = tmp_path / "serve.yaml"
        file.write_text("model: m\ncompilation_config: {mode: 3, backend: eager}\nhf_overrides:\n")
        made = settings(
            "--config", file, "--compilation-config.mode=0", "--compilation_config.pass_config.fuse_norm_quant", "true",
            "--hf-overrides.rope_theta", "1.0", "--speculative-config.method", "ngram",
        )  # fmt: skip
        assert made.engine_options == {
            "compilation_config": {"mode": 0, "backend": "eager", "pass_config": {"fuse_norm_quant": True}},
            "hf_overrides": {"rope_theta": 1.0},
        }
        assert made.engine()["speculative_config"] == {"method": "ngram"}

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--model", "m", "--max-num-seq", "8"], r"'max_num_seq' \(did you mean 'max_num_seqs'\?\)"),
            (["--model", "m", "--model-impl", "vllm"], "--model-impl is --vllm-model-impl here"),
            (["--model", "m", "--api-key", "k"], "set SLIPSTREAM_API_KEY instead"),
            ([], "model is missing: give it as --model"),
            (["--model", "/no/such"], "model='/no/such': there is no such folder"),
            (["--model", "m", "--port", "70000"], "port=70000 is not allowed: it must be an integer >= 0 and <= 65535"),
            (["--model", "m", "--vllm-model-impl", "hf"], "vllm_model_impl='hf' is not one of 'vllm', 'transformers'"),
            (["--model", "m", "--dtype", "fp16"], "dtype='fp16' is not one of 'auto', 'float32', 'bfloat16'"),
            (
                ["--model", "m", "--distributed-executor-backend", "multiprocessing"],
                "distributed_executor_backend='multiprocessing' is not one of 'mp', 'ray', 'uni'",
            ),
            (["--model", "m", "--speculative-config", "{"], "speculative_config='{' is not JSON"),
            (["--model", "m", "--data-parallel-size", "0"], "data_parallel_size=0 is not allowed"),
            (["--model", "m", "stray"], "unexpected argument 'stray'"),
            (["--model", "m", "-O3"], "unexpected argument '-O3'"),
            (["--model", "m", "--what.mode", "3"], "unknown option: 'what'"),
            (["--model", "m", "--seed", "3", "--seed.x", "3"], r"--seed\.x: seed=3 has no parts"),
            (["--model", "m", "--compilation-config.", "3"], r"--compilation-config\. is not allowed"),
            (["--model", "m", "--kernel-config.x+", "3"], r"--kernel-config\.x\+ is not allowed: .* as a whole"),
            (
                ["--model", "m", "--speculative-config", "{}", "--speculative-config.method", "ngram"],
                "speculative_config is given both as a whole and in parts",
            ),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_named(self, words, complaint):
        with pytest.raises(ValueError, match=complaint):
            settings(*words)


class TestProgram:
    def test_help_has_every_option_and_default_at_once(self):
        code = """
            import runpy, sys

            sys.argv[1:] = ["vllm-serve", "--help"]
            try:
                runpy.run_module("slipstream", run_name="__main__")
            finally:
                print({"torch", "vllm", "transformers"} & {*sys.modules})
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "COLUMNS": "160"},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == "set()"  # none of what takes seconds
        for field in vllm_serve.options():
            assert f"--{field.name.replace('_', '-')} " in done.stdout
        for default in ("0.0.0.0", "8000", "0.9", "auto", "16384"):
            assert f"default: {default})" in done.stdout

    def test_no_option_imports_torch(self):
        code = (
            "import sys, slipstream.commands.main; print({'torch', 'vllm', 'fastapi', 'transformers'} & {*sys.modules})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "set()"

    def test_the_server_imports_neither_torch_nor_vllm(self):
        code = "import sys, slipstream.serving.launch; print({'torch', 'vllm', 'transformers'} & {*sys.modules})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "set()"

    def test_a_taken_port_is_named_before_an_engine_starts(self, tmp_path):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            done = run("--model", tmp_path, "--host", "127.0.0.1", "--port", port)
        assert done.returncode == 1
        assert done.stderr.strip() == (
            f"slipstream vllm-serve: cannot listen on port {port} of 127.0.0.1: Address already in use. "
            "Choose another by --port; 0 takes a free one."
        )

    def test_ray_that_is_not_installed_is_one_line_before_an_engine_starts(self, tmp_path):
        words = ["vllm-serve", "--model", str(tmp_path), "--port", "0", "--distributed-executor-backend", "ray"]
        code = f"""
            import runpy, sys

            sys.modules["ray"] = None  # wherever it is installed
            sys.argv[1:] = {words}
            runpy.run_module("slipstream", run_name="__main__")
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.strip() == (
            "slipstream vllm-serve: distributed_executor_backend='ray' needs the package ray, which is not installed "
            "here: pip install ray, on every machine that is to have workers."
        )

    def test_a_host_that_is_not_there_is_named(self, tmp_path):
        done = run("--model", tmp_path, "--host", "not-a-host.invalid")
        assert done.returncode == 1
        assert "of not-a-host.invalid: " in done.stderr
        assert "error" not in done.stderr  # what strerror says of a number that is not its

    def test_no_key_is_left_by_a_server_that_cannot_begin(self, tmp_path):
        done = run("--model", tmp_path, "--host", "127.0.0.1", "--port", 0, "--data-parallel-size", 2,
                   env={"XDG_STATE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "3"})  # fmt: skip
        assert done.returncode == 1
        assert "needs 2 devices, but 1 are visible (3)" in done.stderr
        assert list((tmp_path / "slipstream").iterdir()) == []

    def test_a_server_may_have_as_many_connections_as_the_machine_allows(self):
        code = (
            "import resource as r; most = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (256, most)); "
            "from slipstream.serving.launch import allow_many_files; allow_many_files(); "
            "print(r.getrlimit(r.RLIMIT_NOFILE)[0] == min(65536, most))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "True", done.stderr

    @pytest.mark.parametrize("key", ["", "short", "fifteen-letters", "with a space in it"])
    def test_a_key_that_protects_nothing_is_refused(self, key, tmp_path):
        done = run("--model", tmp_path, "--port", 0, env={"SLIPSTREAM_API_KEY": key})
        assert done.returncode == 1
        assert "SLIPSTREAM_API_KEY" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_folder_without_a_model_ends_the_server_with_the_reason(self, without_model):
        process, folder = without_model
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert "no replica could be started: replica 0 is dead" in errors
        assert str(folder / "none") in errors.partition("its last lines:")[2]
        assert list((folder / "slipstream").iterdir()) == []  # the key has gone with the server


class TestDevices:
    def test_replicas_get_slices_of_the_visible_devices(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5, 6,7,1")
        made = device_slices(Settings(model="m", data_parallel_size=2, tensor_parallel_size=2))
        assert made == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]

    def test_stages_of_a_pipeline_are_workers_too(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
        made = Settings(model="m", data_parallel_size=2, engine_options={"pipeline_parallel_size": 2})
        assert device_slices(made) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
        with pytest.raises(ValueError, match="--data-parallel-size 3 times 2 workers a replica needs 6 devices"):
            device_slices(Settings(model="m", data_parallel_size=3, engine_options={"pipeline_parallel_size": 2}))

    def test_one_replica_takes_what_is_there(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        assert device_slices(Settings(model="m")) == [{}]

    def test_too_few_devices_are_named(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        with pytest.raises(ValueError, match=r"needs 3 devices, but 2 are visible \(4, 5\)"):
            device_slices(Settings(model="m", data_parallel_size=3))


class TestSharedFiles:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        """In place of /dev/shm, where other tests' servers have files, and remove what dead ones left."""
        monkeypatch.setattr(shared_file, "FOLDER", tmp_path)
        return tmp_path

    def test_a_file_is_its_users_alone_and_goes_with_its_server(self):
        file = SharedFile(100)
        file.allocate()
        status = file.path.stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_size >= 100
        file.renew()
        assert file.path.read_bytes()[:32] == file.nonce
        assert remove_abandoned() == 0  # its server lives
        nonce = file.nonce
        file.renew()
        assert file.nonce != nonce
        file.close()
        assert not file.path.exists()

    def test_files_of_dead_servers_are_removed(self, folder):
        code = """
            import os, sys
            from pathlib import Path
            from slipstream.serving import shared_file

            shared_file.FOLDER = Path(sys.argv[1])
            shared_file.SharedFile(9).allocate()
            os.kill(os.getpid(), 9)
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(folder)], timeout=60)
        assert len(list(folder.iterdir())) == 1
        assert remove_abandoned() == 1
        assert not list(folder.iterdir())

    def test_links_that_anybody_may_have_put_there_are_left_alone(self, folder, tmp_path_factory):
        own = tmp_path_factory.mktemp("own") / "file"
        own.write_text("of this user")
        (folder / f"{shared_file._PREFIX}link").symlink_to(own)
        assert remove_abandoned() == 0
        assert own.read_text() == "of this user"

    def test_a_machine_without_shared_memory_says_so(self, monkeypatch, folder):
        monkeypatch.setattr(shared_file, "FOLDER", folder / "none")
        with pytest.raises(HTTPException, match=r"507: weights that do not come through a process group need .*/none"):
            SharedFiles().choose(False, 8)

    def test_writing_outside_is_refused(self):
        file = SharedFile(10)
        try:
            with pytest.raises(ValueError, match="bytes 5 to 11 are outside of the 10 bytes announced"):
                file.write(5, b"123456")
        finally:
            file.close()


def test_engine_options_survive_the_way_to_the_replica():
    made = Settings(model="m", engine_options={"seed": 3})
    assert json.loads(json.dumps(made.replica())) == {
        "engine": made.engine(),
        "reference": False,
        "log_level": "info",
        "parent": os.getpid(),
    }
