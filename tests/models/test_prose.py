"""Prose against its definition, token by token in float64, and its state dict key for key."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from tests.helpers.fake_device import FakeDevice

pytestmark = pytest.mark.usefixtures("one_thread")

ATOMS, HEADS, CHANNELS = 6, 2, 8
ENCODINGS = {"atom_type": [3, 1, 2, 2, 5, 1], "aa_type": [4, 4, 4, 2, 2, 2], "aa_pos": [1, 1, 1, 2, 2, 2], "seq_len": 2}
ORDERS = {"first": [2, 0, 1, 5, 3, 4], "second": [5, 4, 3, 2, 1, 0]}


def make(adaptive: bool) -> jf.Prose:
    config = jf.ProseConfig(
        CHANNELS, 2, 2, head_dim=CHANNELS // HEADS, adaptive=adaptive, lookahead=adaptive, orders=tuple(ORDERS)
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        flow = jf.Prose(config).eval().requires_grad_(False)
        for name, parameter in flow.named_parameters():
            parameter.add_((0.03 if "proj_out" in name else 0.2) * torch.randn_like(parameter))
    return flow


class Oracle:
    """The definition, from the state dict."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: value.double() for name, value in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * self.state.get(f"{name}.weight", 1.0) + self.state.get(f"{name}.bias", 0.0)

    def atoms(self) -> Tensor:
        def waves(numbers: Any) -> Tensor:
            return torch.tensor([_waves(n, 1000.0) for n in numbers], dtype=torch.float64)

        parts = [
            self.state["cond_embed.atom_embed.weight"][ENCODINGS["atom_type"]],
            self.state["cond_embed.residue_embed.weight"][ENCODINGS["aa_type"]],
            waves(ENCODINGS["aa_pos"]), waves([ENCODINGS["seq_len"]] * ATOMS),
        ]  # fmt: skip
        return self.linear("cond_embed.mlp.2", _gelu(self.linear("cond_embed.mlp.0", torch.cat(parts, dim=-1))))

    def tarflow_layer(self, name: str, h: Tensor) -> Tensor:
        a = f"{name}.attention"
        q, k, v = self.linear(f"{a}.qkv", self.norm(f"{a}.norm", h)).chunk(3, dim=-1)
        q, k = self.norm(f"{a}.q_layer_norm", q), self.norm(f"{a}.k_layer_norm", k)
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(CHANNELS // HEADS)
        past = torch.ones(h.shape[1], h.shape[1]).tril().bool()
        mixed = torch.einsum("bhij,bjhd->bihd", logits.masked_fill(~past, -torch.inf).softmax(-1), v).flatten(2)
        h = h + self.linear(f"{a}.proj", mixed)
        return h + self.linear(
            f"{name}.mlp.main.2", _gelu(self.linear(f"{name}.mlp.main.0", self.norm(f"{name}.mlp.norm", h)))
        )

    def adaptive_norm(self, name: str, h: Tensor, c: Tensor) -> Tensor:
        n = self.norm(f"{name}.norm_cond", c)
        return self.linear(f"{name}.to_gamma.0", n).sigmoid() * self.norm("none", h) + self.linear(f"{name}.to_beta", n)

    def parameters(self, i: int, x: Tensor, order: list[int]) -> tuple[Tensor, Tensor]:
        name, c = f"blocks.{i}", self.atoms()[order]
        if f"{name}.proj_cond.2.weight" in self.state:
            c = torch.cat((c, torch.cat((c[1:], torch.zeros(1, CHANNELS)))), dim=-1)
            c = self.linear(f"{name}.proj_cond.2", _gelu(self.linear(f"{name}.proj_cond.0", c)))
        else:
            c = self.linear(f"{name}.proj_cond", c)
        waves = torch.tensor([_waves(t, 10000.0) for t in range(ATOMS)], dtype=torch.float64)
        h = self.linear(f"{name}.proj_in", x) + self.state[f"{name}.pos_embed_scale"] * waves
        for j in range(2):
            layer = f"{name}.attn_blocks.{j}"
            if f"{layer}.mha.adaln.to_beta.weight" not in self.state:
                h = self.tarflow_layer(layer, h + c)
                continue
            inner = self.tarflow_layer(f"{layer}.mha.mha", self.adaptive_norm(f"{layer}.mha.adaln", h, c))
            h = h + self.linear(f"{layer}.mha.scale_output.to_adaln_zero_gamma.0", c).sigmoid() * inner
            t = f"{layer}.transition"
            values, gates = self.linear(f"{t}.transition.swish_linear.0", self.adaptive_norm(f"{t}.adaln", h, c)).chunk(
                2, -1
            )
            out = self.linear(f"{t}.transition.linear_out", gates * gates.sigmoid() * values)
            h = h + self.linear(f"{t}.scale_output.to_adaln_zero_gamma.0", c).sigmoid() * out
        out = self.linear(f"{name}.proj_out", h)
        log_scale, shift = torch.cat((torch.zeros_like(out[:, :1]), out[:, :-1]), dim=1).chunk(2, dim=-1)
        return log_scale, shift

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros(len(x), dtype=torch.float64)
        for i, order in enumerate(ORDERS.values()):
            x = x[:, order]
            log_scale, shift = self.parameters(i, x, order)
            z = torch.empty_like(x)
            z[:, order] = (x - shift) * (-log_scale).exp()
            x, log_det = z, log_det - log_scale.sum(dim=(1, 2))
        return x, log_det


def _waves(number: float, period: float) -> list[float]:
    angles = [number / period ** (2 * k / CHANNELS) for k in range(CHANNELS // 2)]
    return [wave(angle) for angle in angles for wave in (math.sin, math.cos)]


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("strategy", ["sequential", "window:3"])
def test_samples_encode_to_their_latents(adaptive: bool, dtype: torch.dtype, strategy: str) -> None:
    """In float32 the exact loop is native code."""
    flow = make(adaptive).to(dtype)
    peptide = flow.for_peptide(ENCODINGS, ORDERS)
    z = torch.randn(3, ATOMS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    out = jf.sample(peptide, latents=z, strategy=strategy, tolerance=tolerance if strategy != "sequential" else None)
    latents, log_det = Oracle(flow.state_dict()).encode(out.tokens.double())
    rounding = 1e-7 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(latents, z, rtol=0, atol=rounding)
    want = torch.distributions.Normal(0.0, 1.0).log_prob(latents).sum(dim=(1, 2)) + log_det
    torch.testing.assert_close(out.log_prob.double(), want, rtol=0, atol=rounding)


def test_the_embeddings_of_atoms_have_gradients_of_an_inverse() -> None:
    """Against differences of the loss."""
    flow, generator = make(True).double().requires_grad_(), torch.Generator().manual_seed(0)
    peptide, weight = flow.for_peptide(ENCODINGS, ORDERS), flow.cond_embed.atom_embed.weight
    z = torch.randn(2, ATOMS, 3, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        x, log_prob = jf.decode(peptide, z, strategy="sequential", log_prob=True)
        return log_prob.mean() + x.sin().mean()

    direction, losses = torch.randn(weight.shape, generator=generator, dtype=torch.float64), list[float]()
    (gradient,) = torch.autograd.grad(loss(), weight)
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
        losses.append(loss().item())
    assert float((gradient * direction).sum()) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5) != 0


def test_a_sensitivity_is_the_distance_from_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacobiflow.sampling.sensitivity.FLOAT64_BOUND", 0.0)
    flow, z = make(True), torch.randn(3, ATOMS, 3, generator=torch.Generator().manual_seed(0))
    exact = jf.sample(copy.deepcopy(flow).double().for_peptide(ENCODINGS, ORDERS), latents=z, strategy="sequential")
    out = jf.sample(flow.for_peptide(ENCODINGS, ORDERS), latents=z, strategy="sequential", sensitivity=True)
    distance = (out.tokens - exact.tokens).abs().flatten(1).amax(dim=1)
    torch.testing.assert_close(out.sensitivity.double(), distance, rtol=0.2, atol=1e-7)


def test_a_view_moves_with_its_encodings() -> None:
    flow = make(True)
    peptide = flow.for_peptide(ENCODINGS, ORDERS)
    want = jf.sample(peptide, 2, strategy="window:3", tolerance=1e-5).tokens
    with FakeDevice():
        for moved in (peptide.to("cuda"), flow.for_peptide(ENCODINGS, ORDERS)):
            assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"cuda"}
            have = jf.sample(moved, 2, strategy="window:3", tolerance=1e-5).tokens
            torch.testing.assert_close(have.cpu(), want, rtol=0, atol=1e-4)


def test_two_peptides_are_two_flows(tmp_path: Path) -> None:
    """Also if they have as many atoms."""
    flow = make(True)
    peptides = [
        flow.for_peptide(ENCODINGS, ORDERS),
        flow.for_peptide(ENCODINGS | {"aa_pos": [1, 1, 1, 1, 2, 2]}, ORDERS),
        flow.for_peptide(ENCODINGS, ORDERS | {"second": [4, 5, 3, 2, 1, 0]}),
    ]
    assert len(set(map(fingerprint, [flow, *peptides]))) == 4
    assert fingerprint(flow.for_peptide(ENCODINGS, ORDERS)) == fingerprint(peptides[0])
    jf.sample_to_folder(peptides[0], 2, tmp_path)
    with pytest.raises(jf.InputError, match="samples of different flow"):
        jf.sample_to_folder(peptides[1], 4, tmp_path)


def test_a_view_saves_the_flow_of_any_peptide_with_a_card_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = make(True)
    flow.for_peptide(ENCODINGS, ORDERS).for_peptide(ENCODINGS, ORDERS).save_pretrained(tmp_path / "model")
    assert fingerprint(jf.load(tmp_path / "model")) == fingerprint(flow)
    monkeypatch.chdir(tmp_path)
    code = Path("model/README.md").read_text().split("```")[1].removeprefix("python\n")
    exec(code, {"encodings": ENCODINGS, "permutations": ORDERS})
    assert capsys.readouterr().out == "(8, 6, 3)\n"


@pytest.mark.parametrize("adaptive", [True, False])
def test_its_state_dict_is_read(tmp_path: Path, adaptive: bool) -> None:
    config = jf.ProseConfig(64, 2, 1, adaptive=adaptive, lookahead=adaptive, orders=tuple(ORDERS))
    flow = jf.Prose(config)
    state = {name: tensor for name, tensor in flow.state_dict().items() if name != "var"}
    torch.save(state | {"blocks.0.attn_mask": torch.ones(ATOMS, ATOMS).tril()}, tmp_path / "prose.pth")
    loaded = jf.Prose.from_original(tmp_path / "prose.pth", tuple(ORDERS))
    assert loaded.config == config
    loaded.save_pretrained(tmp_path / "folder")
    for again in (loaded, jf.load(tmp_path / "folder")):
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), flow.parameters(), strict=True))
    torch.save({name: tensor for name, tensor in state.items() if "qkv.bias" not in name}, tmp_path / "other.pth")
    with pytest.raises(jf.CheckpointError, match=r"other\.pth"):
        jf.Prose.from_original(tmp_path / "other.pth", tuple(ORDERS))


@pytest.mark.parametrize("orders", [(), None, 5, "first", [1, 2], ("first", None)])
def test_names_of_orders_of_the_wrong_kind_are_refused(tmp_path: Path, orders: Any) -> None:
    torch.save(jf.Prose(jf.ProseConfig(64, 2, 1)).state_dict(), tmp_path / "prose.pth")
    with pytest.raises(jf.InputError, match=r"^orders=.*: give a tuple of names of permutations"):
        jf.Prose.from_original(tmp_path / "prose.pth", orders)


def test_a_peptide_that_does_not_fit_is_named() -> None:
    flow = make(True)
    with pytest.raises(ValueError, match="give the view of one"):
        jf.sample(flow, 2)
    changes: dict[str, tuple[Any, Any]] = {
        "encodings=None of type NoneType: give a dict": (None, ORDERS),
        r"permutations=\[1\] of type list: give a dict": (ENCODINGS, [1]),
        "lack seq_len, second": ({k: v for k, v in ENCODINGS.items() if k != "seq_len"}, {"first": ORDERS["first"]}),
        "atom_type=.*from 1, which is no padding": (ENCODINGS | {"atom_type": [0] * ATOMS}, ORDERS),
        "aa_pos=.*for each of 6 atoms": (ENCODINGS | {"aa_pos": [1, 2]}, ORDERS),
        "aa_pos=None: give whole numbers": (ENCODINGS | {"aa_pos": None}, ORDERS),
        "aa_type=.*: give whole numbers": (ENCODINGS | {"aa_type": torch.ones(ATOMS, device="meta")}, ORDERS),
        "first='abc': give whole numbers": (ENCODINGS, ORDERS | {"first": "abc"}),
        "2 indices, but 6 atoms": (ENCODINGS, ORDERS | {"second": [0, 1]}),
        "give each of 0 to 5 once": (ENCODINGS, ORDERS | {"second": [0] * ATOMS}),
    }
    for words, arguments in changes.items():
        with pytest.raises(jf.InputError, match=words):
            flow.for_peptide(*arguments)
