"""`jacobiflow convert`, `jacobiflow info` and `jacobiflow info --check`."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.data import image_grid, scale
from jacobiflow.sampling.folder import sample_to_folder
from tests.helpers.running import figures
from tests.helpers.stand_ins import write_t5


def test_convert(run: Any, refuse: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = jf.TarFlow(jf.TarFlowConfig(3, 4, 2, width=64, num_blocks=2, layers_per_block=1, num_classes=2))
    flow.to_original(tmp_path / "original.pth")
    line = f"convert {tmp_path}/original.pth --patch-size 2 --noise-std 0.2 --out {tmp_path}/folder"
    result = run(line)
    assert (result.code, result.err) == (0, "")
    read = jf.load(tmp_path / "folder")
    shape = "105,520 weights, images of 3x4x4 with noise 0.2, 4 tokens of 12 values, 2 classes"
    assert result.out.startswith(f"{shape}\nwrote the model folder {tmp_path}/folder: jacobiflow sample --model ")
    assert read.config == replace(flow.config, noise_std=0.2)
    assert read.recommended == jf.SamplingSettings(denoise=1.0)
    for name, tensor in flow.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    refuse(line, "folder: holds a model already; remove that folder first, or give another")
    flow.to_original(tmp_path / "cat_2_64_2_1_0.20.pth")
    refuse(f"sample --model {tmp_path}/cat_2_64_2_1_0.20.pth", "cat_2_64_2_1_0.20.pth --out FOLDER")
    assert run(f"convert {tmp_path}/cat_2_64_2_1_0.20.pth --out {tmp_path}/named").code == 0
    named = jf.load(tmp_path / "named")
    assert (named.config, named.recommended) == (read.config, read.recommended)
    refuse(f"sample --model {tmp_path}/original.pth", "original.pth --patch-size P --noise-std S --out FOLDER (the")
    jf.load(tmp_path / "named").to_original(tmp_path / "plain.pth")
    checkpoint = {"epoch": 3, "state_dict": torch.load(tmp_path / "plain.pth"), "callbacks": {}, "lr_schedulers": []}
    torch.save(checkpoint, tmp_path / "lightning.ckpt")
    assert run(f"convert {tmp_path}/lightning.ckpt --patch-size 2 --noise-std 0.2 --out {tmp_path}/ckpt").code == 0
    assert jf.load(tmp_path / "ckpt").config == read.config
    torch.save(jf.Prose(jf.ProseConfig(64, 2, 1)).state_dict(), tmp_path / "prose.pth")
    refuse(f"convert {tmp_path}/prose.pth --out {tmp_path}/prose", "read them in Python: jf.Prose.from_original(file)")
    refuse(f"convert {tmp_path}/original.pth --out {tmp_path}/0", "in the name; give --patch-size 2 --noise-std S. If")
    for size, warning, remedy, shape in (
        (1, "made a flow of 12 channels, which draws no pictures", "--patch-size 2 --noise-std S", (12, 2, 2)),
        (2, "its name gives no noise", "--noise-std S", (3, 4, 4)),
    ):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            result = run(f"convert {tmp_path}/original.pth --patch-size {size} --out {tmp_path}/{size}")
        assert warning in result.err
        assert result.err.endswith(f"convert it again with {remedy}\n")
        assert jf.load(tmp_path / str(size)).image_shape == shape
    grey = jf.TarFlow(jf.TarFlowConfig(1, 4, 2, width=64, num_blocks=1, layers_per_block=1))
    grey.to_original(tmp_path / "grey.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        err = run(f"convert {tmp_path}/grey.pth --out {tmp_path}/grey").err
    assert "made a flow over tokens, which draws no pictures" in err
    assert err.endswith("convert it again with --patch-size P --noise-std S\n")


def test_info(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(f"info --model model --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    entries, flow = figures(tmp_path / "f"), jf.load("./model")
    assert entries["parameters"] == sum(parameter.numel() for parameter in flow.parameters())
    assert (entries["num_tokens"], entries["token_dim"], entries["noise_std"]) == (16, 4, 0.1)
    assert (entries["torch"], entries["zuko"]) == (torch.__version__, version("zuko"))
    for line in result.out.splitlines():
        name, value = line.split(maxsplit=1)
        assert str(entries[name]) == value
    assert entries["native_loops"] == native.describe()
    monkeypatch.setenv("JACOBIFLOW_NATIVE", "0")
    assert "none: native code is off, by JACOBIFLOW_NATIVE=0" in run("info --model model").out


def test_check_of_samples_names_every_damaged_file(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample_to_folder(jf.load("./plain"), 4, out, strategy="jacobi-1", batch_size=1, shard_size=2)
    result = run(f"info --check {out}")
    outcome = jf.SampleFolder.open(out).outcome()
    assert (result.code, result.out) == (0, f"{out}: no problem; checked samples\n{outcome}\n")
    file = out / "shards" / "00001.npz"
    file.write_bytes(file.read_bytes()[:-9])
    (out / "shards" / "00000.npz").unlink()
    result = run(f"info --check {out} --json {tmp_path}/f")
    assert (result.code, result.err) == (2, "")
    problems = [f"{out}: shard-{i:05} is missing, or does not match its checksum; sample into" for i in range(2)]
    assert all(problem in line for problem, line in zip(problems, result.out.splitlines(), strict=True))
    assert figures(tmp_path / "f")["problems"] == result.out.splitlines()


def test_check_of_a_training_run(run: Any, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "training"}')
    result = run(f"info --check {tmp_path}")
    assert (result.code, f"{tmp_path}/manifest.json: training in format None" in result.out) == (2, True)


def test_the_memory_of_a_model_is_shown_without_its_weights(run: Any, refuse: Any, tmp_path: Path) -> None:
    jf.load("fashion-p2").save_pretrained(tmp_path / "model", dtype="bfloat16")
    assert run(f"info --check {tmp_path}/model").out == f"{tmp_path}/model: no problem; checked a model\n"
    (tmp_path / "model" / "model.safetensors").unlink()
    result = run(f"info --model {tmp_path}/model --memory --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    sizes = {dtype: figures(tmp_path / "f")[dtype] for dtype in ("float32", "bfloat16")}
    assert sizes["float32"]["weights"] == 2 * sizes["bfloat16"]["weights"] > 4e6
    assert f"{sizes['bfloat16']['weights'] / 2**20:.1f} MiB" in result.out
    assert "guidance: 3,attn_temperature=1.4" in result.out
    refuse("info --model petz --memory", 'Invalid value "petz" for --model. No such model. Give a bundled model (')


def test_check_of_a_model_uses_its_reports_and_its_weights(run: Any, refuse: Any, tmp_path: Path) -> None:
    assert run("info --check digits-p1").out == "digits-p1: no problem; checked a model\n"
    flow = jf.load("./plain")
    with torch.no_grad():
        flow.blocks[0].proj_out.bias[:4] = 200  # exp(200) overflows float32
    flow.save_pretrained(tmp_path)
    for name in ("report.json", "report-guided.json"):
        shutil.copy("report.json", tmp_path / name)
    result = run(f"info --check {tmp_path}")
    *reports, images = result.out.splitlines()
    assert (result.code, ["the report is of another flow" in line for line in reports]) == (2, [True, True])
    assert images.startswith(f"{tmp_path}: a latent that is decoded and encoded again is off by nan")
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors: missing" in run(f"info --check {tmp_path}").out
    refuse("info --check pets", "pets: no model, samples or training run; give the folder of one, or a model's name")


def test_convert_a_starflow(run: Any, refuse: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = jf.STARFlow(jf.STARFlowConfig(3, 4, 2, 64, (1, 2), text_tokens=3, text_dim=16, noise_std=0.1))
    state = {name: tensor for name, tensor in flow.state_dict().items() if "null_text" not in name}
    torch.save(state | {"feat_rope.freqs_cos": torch.zeros(7, 32)}, tmp_path / "star.pth")
    (tmp_path / "words.py").write_text("import torch\nencode = lambda prompts: torch.ones(len(prompts), 1, 16)\n")
    line = f"convert {tmp_path}/star.pth --patch-size 2 --noise-std 0.1 --out {tmp_path}/star"
    result = run(f"{line} --encode-text {tmp_path}/words.py:encode")
    assert (result.code, result.err) == (0, "")
    read = jf.load(tmp_path / "star")
    assert read.config == flow.config and read.recommended.guidance == jf.Guidance.parse(
        "3.6,annealed=false,rule=density"
    )
    assert torch.equal(read.blocks[-1].null_text[:2], torch.tensor([[1.0] * 16, [0.0] * 16]))
    write_t5(tmp_path / "t5")
    assert run(f"{line}3 --encode-text {tmp_path}/t5").code == 0
    assert run(f"sample --model {tmp_path}/star3 --num 1 --prompts red --out {tmp_path}/o").code == 0
    refuse(f"{line}2 --encode-text {tmp_path}/words.py:decode", "words.py:decode: no function of this name in the file")
    refuse(f"sample --model {tmp_path}/star --prompts cat --out {tmp_path}/o", "--prompts cat: give --encode-text, too")
    refuse(f"sample --model model --prompts cat --out {tmp_path}/o", "--prompts cat: this flow reads no text")
    refuse(f"sample --model {tmp_path}/star --encode-text {tmp_path}/words.py:encode --out o-x", "give --prompts, too")
    (tmp_path / "words.py").write_text("encode = lambda prompts: prompts['cat']\n")
    want = f"{tmp_path}/words.py:encode: the function raised TypeError (list indices must be integers"
    refuse(f"{line}2 --encode-text {tmp_path}/words.py:encode", want)
    (tmp_path / "words.py").write_text("encode = lambda prompts: None\n")
    want = "result of encode_text=None of type NoneType: give a torch.Tensor of floating-point numbers (1, L, K)"
    refuse(f"{line}2 --encode-text {tmp_path}/words.py:encode", want)
    refuse(f"sample --model {tmp_path}/star --prompts cat --encode-text {tmp_path}/words.py:encode --out o-x", want)


def test_prompts_become_samples(run: Any, refuse: Any, tmp_path: Path) -> None:
    """Each of a file in turn; other prompts are another run."""
    torch.manual_seed(0)
    flow = jf.STARFlow(jf.STARFlowConfig(3, 4, 2, 64, (1, 2), text_tokens=3, text_dim=5))
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    flow.blocks[-1].null_text.fill_(0.5)
    flow.recommended = jf.SamplingSettings(jf.Guidance(2.0, annealed=False, rule="density"))
    flow.save_pretrained(tmp_path / "star")
    words = "import torch\ndef encode(prompts):\n return torch.tensor([[[float(len(p))] * 5] for p in prompts])\n"
    (tmp_path / "words.py").write_text(words)
    (tmp_path / "prompts.txt").write_text("cat\nhouse\n")
    model = f"--model {tmp_path}/star --num 3"
    line = (
        f"sample {model} --prompts {tmp_path}/prompts.txt --encode-text {tmp_path}/words.py:encode --out {tmp_path}/o"
    )
    result = run(line)
    assert (result.code, result.err) == (0, "")
    states = torch.tensor([[[3.0] * 5], [[5.0] * 5], [[3.0] * 5]])
    view = jf.load(tmp_path / "star").guided(flow.recommended.guidance)
    want = jf.sample(view, 3, context=states, strategy="sequential").images
    stored = jf.SampleFolder.open(tmp_path / "o").images(0)
    assert (stored.float() / 127.5 - 1 - want.clamp(-1, 1)).abs().max() <= 1.5 / 127.5
    with Image.open(tmp_path / "o" / "samples.png") as sheet:
        assert sheet.tobytes() == image_grid(scale(stored), 3, names=["cat", "house", "cat"]).tobytes()
    assert "all 3 were there already" in run(line).out
    assert "all 3 were there already" in run(line.replace(f"{tmp_path}/prompts.txt", "cat house")).out
    (tmp_path / "prompts.txt").write_text("cat\nmouses\n")
    refuse(line, "holds samples of different labels or context; give another folder")
    refuse(f"evaluate --model {tmp_path}/star --samples {tmp_path}/o --paired 4 --out o-x", "not in the folder; give 0")
    result = run(line.replace("/o", "/c") + " --compare")
    assert (result.code, "first batch of 3 again, without denoising: original sampler " in result.out) == (0, True)


def test_captions_are_the_default_prompts(run: Any, tmp_path: Path) -> None:
    """There is a sample for each prompt; prompts beyond --num are left out with a warning."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"text_tokens": 3, "text_dim": 5, "captions": ("red heart",)}
    flow = jf.STARFlow(jf.STARFlowConfig(3, 4, 2, 64, (1, 2), **sizes))
    flow.blocks[-1].null_text.fill_(0.5)
    flow.save_pretrained(tmp_path / "star")

    def sheet(options: str) -> tuple[jf.SampleFolder, Any]:
        out = tmp_path / f"o{len(list(tmp_path.iterdir()))}"
        result = run(f"sample --model {tmp_path}/star --out {out} {options}")
        assert result.code == 0
        return jf.SampleFolder.open(out), (result.err, (out / "samples.png").read_bytes())

    named = sheet("--prompts 'red heart' 'red heart'")
    assert named[0].spec.num == 2 and named[1] == sheet("--num 2")[1] != sheet("--num 2 --labels none")[1]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert "--num 1: leaves out 1 prompt" in sheet("--num 1 --prompts 'red heart' 'red heart'")[1][0]
