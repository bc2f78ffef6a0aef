"""LightningDataModules for image classification, one file a family of data sets. Code only: no raw files live here.

Every module yields `(images, labels)`: images uint8 `[N, 3, H, W]` on 0..255 from its loaders, labels int64 `[N]`.
Lightning moves the batch to the device and then calls the module's `on_after_batch_transfer`, which normalises it
there, so that networks receive float32 and know nothing of pixels. See `data.base.ImageDataModule`.
"""
