import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits

from data.digits import DigitsDataModule, evaluation_part


def everything(loader):
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_split_is_fixed_stratified_and_disjoint():
    digits = load_digits()
    labels = torch.from_numpy(digits.target)
    part = evaluation_part(labels)
    assert int(part.sum()) == 359
    shares = torch.bincount(labels[part]) / torch.bincount(labels)
    assert float(shares.min()) > 0.19
    assert float(shares.max()) < 0.21
    # Written down once: whoever changes the split changes what published figures mean.
    positions = torch.nonzero(part).flatten().tolist()
    assert positions[:12] == [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 55, 63]
    assert sum(positions) == 322016

    module = DigitsDataModule(augment=False, seed=7)
    module.setup()
    stored = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    assert torch.equal(module.val_set.images[:, 0], stored[part])
    assert torch.equal(module.train_set.images[:, 0], stored[~part])
    assert torch.equal(module.train_set.labels, labels[~part])


def test_batches_are_uint8_with_three_channels():
    module = DigitsDataModule(batch_size_per_device=100)
    images, labels = everything(module.train_dataloader())
    assert images.shape == (1400, 3, 32, 32)  # 1438 images: the last, smaller batch is dropped
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    images, labels = everything(module.val_dataloader())
    assert images.shape == (359, 3, 32, 32)
    assert int(images.max()) == 255
    assert torch.bincount(labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


def test_image_size_is_free():
    module = DigitsDataModule(image_size=50, batch_size_per_device=3)
    images, _ = next(iter(module.train_dataloader()))
    assert images.shape == (3, 3, 50, 50)


def test_training_is_reproducible_and_differs_between_epochs():
    def epochs(seed):
        loader = DigitsDataModule(seed=seed).train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            yield next(iter(loader))

    first, second = epochs(0), epochs(0)
    for (images, labels), (same_images, same_labels) in zip(first, second, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    (one, _), (two, _) = epochs(0)
    assert not torch.equal(one, two)
    assert not torch.equal(one, next(epochs(1))[0])


def test_workers_do_not_change_the_images():
    alone = everything(DigitsDataModule(num_workers=0).train_dataloader())
    torch.manual_seed(123)
    helped = everything(DigitsDataModule(num_workers=2).train_dataloader())
    assert torch.equal(alone[0], helped[0])
    assert torch.equal(alone[1], helped[1])


def test_loaders_leave_the_global_generator_alone():
    module = DigitsDataModule()
    state = torch.get_rng_state()
    next(iter(module.train_dataloader()))
    next(iter(module.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), state)


class Recorder(pl.LightningModule):
    """A linear classifier that remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 32 * 32, 10)
        self.seen = []
        self.evaluated = 0

    def training_step(self, batch, batch_idx):
        images, labels = batch
        if batch_idx == 0:
            self.seen.append(images.clone())
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        self.evaluated += len(batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_lightning_gets_normalised_batches_and_a_new_order_each_epoch(tmp_path):
    module, model = DigitsDataModule(normalize="half"), Recorder()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, module)
    first, second = model.seen
    assert first.dtype == torch.float32
    assert float(first.min()) == -1.0
    assert float(first.max()) == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(first, second)
    raw, _ = next(iter(DigitsDataModule().train_dataloader()))
    assert torch.equal(first, (raw.float() - 127.5) / 127.5)
    assert model.evaluated == 2 * 359
