"""What MTAdamTrainer refuses: arguments of a Trainer, optimizers, and losses that are none."""

import pytest
import torch
from mtadam_trainers import TERMS, MTAdamTrainer, TwoHeads, arguments, model, trainer

from fastkit.optim import MTAdam

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def replaced(run, **attributes):
    """The class, as if accelerate or the machine had said so."""

    class Replaced(run):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            for name, value in attributes.items():
                setattr(self, name, value)

    return Replaced


class Overridden(MTAdamTrainer):
    def compute_loss(self, *args, **kwargs):
        raise AssertionError


REFUSED = {
    "no terms": ({"terms": None}, ValueError, "terms must name the losses, got None"),
    "a name": ({"terms": "word"}, TypeError, "terms must be a list of the losses' names, got 'word'"),
    "a count": ({"terms": 2}, TypeError, "terms must be a list of the losses' names, got 2"),
    "empty": ({"terms": []}, ValueError, r"terms must be one or more different names, got \[\]"),
    "twice": ({"terms": ["a", "a"]}, ValueError, "terms must be one or more different names, got"),
    "options": ({"mtadam": ["anchor"]}, TypeError, "mtadam must be a dict of options, got list"),
    "lr": ({"mtadam": {"lr": 1.0}}, ValueError, "mtadam must not have 'lr'; give it as args.learning_rate"),
    "terms in options": ({"mtadam": {"terms": TERMS}}, ValueError, "mtadam must not have 'terms'; give"),
    "a class": (
        {"optimizer_cls_and_kwargs": (MTAdam, {})},
        ValueError,
        "optimizer_cls_and_kwargs must be None, got a class; pass MTAdam's options as mtadam=",
    ),
    "optim": ({"optim": "adafactor"}, ValueError, "args.optim must be left as it is, .* got 'adafactor'"),
    "smoothing": ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor must be 0, got 0.1"),
    "signals": ({"enable_jit_checkpoint": True}, ValueError, "enable_jit_checkpoint must be False, got True"),
    "reentrant": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        ValueError,
        "use_reentrant must be False in checkpointing, got True",
    ),
    "overridden": ({"kind": Overridden}, ValueError, "compute_loss must not be overridden, .*_losses"),
    "DeepSpeed": (
        {"kind": replaced(MTAdamTrainer, is_deepspeed_enabled=True)},
        ValueError,
        "each process must have the whole model and its own gradients, got DeepSpeed; train on one device",
    ),
    "FSDP": (
        {"kind": replaced(MTAdamTrainer, is_fsdp_enabled=True)},
        ValueError,
        "each process must have the whole model and its own gradients, got FSDP; train on one device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *args: None)  # by which enable_jit_checkpoint would go
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^MTAdamTrainer: .*{message}"):
        trainer(tmp_path, **options)


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(
        ValueError, match=r"^MTAdamTrainer: .* got torch\.nn\.DataParallel over 2 devices; train on"
    ):
        trainer(tmp_path, args=args)


def test_optimizers_that_are_refused(tmp_path):
    net = model()
    params = list(net.parameters())
    for optimizer, options, error, message in [
        (torch.optim.AdamW(params), {}, TypeError, "optimizers must have an MTAdam, got AdamW"),
        (MTAdam(params), {}, ValueError, "the MTAdam of optimizers= must know its terms"),
        (MTAdam(params, terms=2), {}, ValueError, "terms must be those of the optimizer, 0, 1, got word,"),
        (MTAdam(params, terms=TERMS), {"mtadam": {}}, ValueError, "mtadam must be None beside optimizers="),
    ]:  # fmt: skip
        with pytest.raises(error, match=f"^MTAdamTrainer: {message}"):
            trainer(tmp_path, net, optimizers=(optimizer, None), **options)


def test_streaming_with_accumulation_is_refused(tmp_path):
    options = {"mode": "streaming", "on_nonfinite": "skip_term"}
    run = trainer(tmp_path, mtadam=options, gradient_accumulation_steps=2)
    with pytest.raises(
        ValueError, match=r"^MTAdamTrainer: mode must be batched with gradient accumulation, got"
    ):
        run.train()


class Tuple(TwoHeads):
    def output(self, losses, words, sentence):
        return losses, words


class Single(TwoHeads):
    def output(self, losses, words, sentence):
        return {"loss": losses["word"], "words": words}


class Rows(TwoHeads):
    def output(self, losses, words, sentence):
        return {"losses": {"word": losses["word"].expand(4), "sentence": 0.0}}


@pytest.mark.parametrize(
    ("net", "options", "error", "message"),
    [
        (Tuple, {}, TypeError, "the model's output must be a dict or a ModelOutput, got tuple; return one"),
        (Single, {}, ValueError, "losses must have all terms, word, sentence, got loss, words; give None"),
        (Single, {"losses": "loss"}, TypeError, "losses must be a dict by term, got Tensor; return one from"),
        (
            Single,
            {"losses": "parts"},
            ValueError,
            "losses must be a field of the model's output, got 'parts'",
        ),
        (
            TwoHeads,
            {"terms": [*TERMS, "size"]},
            ValueError,
            "losses must have all terms, .*, size, got word, sen",
        ),
        (Rows, {}, TypeError, r"the loss of term 'word' must be a scalar tensor or None, got shape \(4,\)"),
        (
            Rows,
            {"terms": ["sentence"]},
            TypeError,
            "the loss of term 'sentence' must be a scalar .* got float",
        ),
    ],
)
def test_losses_that_are_refused(tmp_path, net, options, error, message):
    with pytest.raises(error, match=f"^MTAdamTrainer: {message}"):
        trainer(tmp_path, model(net), **options).train()


def test_a_norm_to_clip_to_warns(tmp_path):
    with pytest.warns(
        UserWarning, match=r"^MTAdamTrainer: max_grad_norm 0\.5 has no effect: .*; set it to 0$"
    ):
        trainer(tmp_path, max_grad_norm=0.5)
