"""Trains and evaluates a classifier of images, as an adapter or as a whole, on folders of images.

    python run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k --train_dir flowers \
        --do_train --do_eval --output_dir out/flowers --train_adapter --adapter_config lora

README.md has more command lines; `python run_image_classification.py --help` has every option.
"""

import inspect
import logging
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from sklearn.metrics import accuracy_score
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from adapters import AdapterArguments, AdapterTrainer, AutoAdapterModel, setup_adapter_training
from adapters.errors import AdapterError
from adapters.training import AdapterTrainingArguments, parse_options, set_up_logging

logger = logging.getLogger(__name__)

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
"""What a dataset of the Hub may call its columns; the first that it has is taken."""


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset: a name on the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with a folder of images for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_dir: str | None = field(default=None, metadata={"help": "The same, or images without classes, to predict."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training data to evaluate on, if there is no validation data."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Column of images of a dataset."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of classes of a dataset."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width that images are brought to; else as the model was trained."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Show the model half of the images as in a mirror."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test examples."})

    def __post_init__(self) -> None:
        if not (self.dataset_name or self.train_dir or self.validation_dir or self.test_dir):
            raise AdapterError("No data given; pass --dataset_name, or --train_dir and --validation_dir.")
        if not 0 < self.train_val_split < 1:
            raise AdapterError(f"train_val_split={self.train_val_split}: it is no share; it must be between 0 and 1.")
        if self.image_size is not None and self.image_size < 1:
            raise AdapterError(f"image_size={self.image_size}: it is too small; it must be at least 1.")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={"help": "Pretrained model: a name on the Hub or a local folder."},
    )
    image_processor_name: str | None = field(default=None, metadata={"help": "Its processor, if it is elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def parse_arguments() -> tuple[Any, ...]:
    return parse_options(ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments)


# --- Reading data ----------------------------------------------------------------------------------------------------


def read_folder(folder: str, classless: bool = False) -> Dataset:
    """The images below `folder`, each with the name of its folder as its class, in the order of their names."""
    root = Path(folder)
    if not root.is_dir():
        raise AdapterError(f"{folder}: there is no such folder; it must have a folder of images for each class.")
    known = Pillow.registered_extensions()
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in known)
    if not files:
        raise AdapterError(f"{folder}: there are no images in it; it must have a folder of images for each class.")
    if not classless and (loose := [file for file in files if file.parent == root]):
        raise AdapterError(f"{loose[0]}: the image is in no folder of a class; it must be in {folder}/<class>/.")
    for file in files:
        try:
            with Pillow.open(file):  # reads the first bytes only
                pass
        except (UnidentifiedImageError, OSError) as error:
            raise AdapterError(f"{file}: it cannot be read as an image ({error}); mend it or take it away.") from error
    rows: dict[str, list[str]] = {"image": [str(file) for file in files]}
    if all(file.parent != root for file in files):
        rows["label"] = [file.relative_to(root).parts[0] for file in files]
    return Dataset.from_dict(rows).cast_column("image", Image())


def choose_column(data: Dataset, asked: str | None, usual: Sequence[str]) -> str:
    found = next((name for name in ([asked] if asked else usual) if name in data.column_names), None)
    if found is None:
        raise AdapterError(
            f"The data has no column {asked or ' or '.join(usual)}, only {', '.join(data.column_names)}; name the "
            "right one with --image_column_name or --label_column_name."
        )
    return found


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments, do_eval: bool) -> DatasetDict:
    """The splits train, validation and test, as far as they are there, with the columns image and label."""
    if data_args.dataset_name is not None:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        data = load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
        for name, asked, usual in (
            ("image", data_args.image_column_name, IMAGE_COLUMNS),
            ("label", data_args.label_column_name, LABEL_COLUMNS),
        ):
            column = choose_column(next(iter(data.values())), asked, usual)
            data = data if column == name else data.rename_column(column, name)
    else:
        folders = {"train": data_args.train_dir, "validation": data_args.validation_dir, "test": data_args.test_dir}
        data = DatasetDict(
            {split: read_folder(folder, split == "test") for split, folder in folders.items() if folder is not None}
        )
    if do_eval and "validation" not in data and "train" in data:
        if len(data["train"]) < 2:
            raise AdapterError("There is no validation data, and one image cannot be split. Pass --validation_dir.")
        parts = data["train"].train_test_split(data_args.train_val_split, seed=0)
        data["train"], data["validation"] = parts["train"], parts["test"]
    return data


def choose_splits(data: DatasetDict, training_args: AdapterTrainingArguments) -> list[str]:
    wanted = {
        "train": training_args.do_train,
        "validation": training_args.do_eval,
        "test": training_args.do_predict,
    }
    for split, needed in wanted.items():
        if needed and split not in data:
            raise AdapterError(
                f"There is no {split} data, only {', '.join(data)}; it is needed for what is to be done."
            )
    return [split for split, needed in wanted.items() if needed]


def list_labels(data: DatasetDict) -> list[str]:
    """The classes in the order of their numbers: those of training, also if it is not trained on."""
    reference = data["train"] if "train" in data else next(iter(data.values()))
    if "label" not in reference.column_names:
        raise AdapterError("The images have no classes; pass --train_dir or --validation_dir, which name them.")
    feature = reference.features["label"]
    return list(feature.names) if isinstance(feature, ClassLabel) else list(map(str, sorted(reference.unique("label"))))


def prepare(data: Dataset, split: str, labels: Sequence[str], data_args: DataTrainingArguments) -> Dataset:
    """The split with its classes as numbers, and no more rows than asked for; of the training data any."""
    feature = data.features.get("label")
    if feature is not None and not isinstance(feature, ClassLabel):
        numbers = {label: number for number, label in enumerate(labels)}
        given = list(map(str, data["label"]))
        if unseen := sorted(set(given) - set(numbers)):
            raise AdapterError(
                f"The {split} data has the class {unseen[0]!r}, which is not one of training; "
                f"it must be one of {', '.join(labels)}."
            )
        data = data.remove_columns("label").add_column("label", [numbers[label] for label in given])
    data = data.select_columns([name for name in ("image", "label") if name in data.column_names])
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    limit = limits[split]
    # Folders come class by class: the first rows would be of one class.
    return data if limit is None else data.shuffle(seed=0).select(range(min(limit, len(data))))


# --- From images to examples -----------------------------------------------------------------------------------------


def load_processor(model_args: ModelArguments, data_args: DataTrainingArguments) -> BaseImageProcessor:
    processor = AutoImageProcessor.from_pretrained(
        model_args.image_processor_name or model_args.model_name_or_path,
        cache_dir=model_args.cache_dir,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )
    if data_args.image_size is not None:
        size = {"height": data_args.image_size, "width": data_args.image_size}
        processor.size = type(processor.size)(**size) if processor.size is not None else size
        processor.do_center_crop = False
    return processor


def show(data: Dataset, processor: BaseImageProcessor, flip: bool) -> Dataset:
    """The split whose images are read and brought into the model's form when they are needed."""

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        if flip:
            images = [ImageOps.mirror(image) if random.random() < 0.5 else image for image in images]
        rows: dict[str, Any] = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
        return rows | ({"labels": batch["label"]} if "label" in batch else {})

    return data.with_transform(transform)


def build_collator(model: PreTrainedModel, image_size: int | None) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Rows as a batch; a model that has to be told so learns that its images have another size than in pretraining."""
    parameters = inspect.signature(model.base_model.forward).parameters
    told = image_size is not None and "interpolate_pos_encoding" in parameters

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch | ({"interpolate_pos_encoding": True} if told else {})

    return collate


# --- Model -----------------------------------------------------------------------------------------------------------


def load_model(model_args: ModelArguments) -> PreTrainedModel:
    return AutoAdapterModel.from_pretrained(
        model_args.model_name_or_path,
        cache_dir=model_args.cache_dir,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )


def ensure_head(model: PreTrainedModel, name: str, labels: Sequence[str]) -> None:
    """Gives the model the head `name` for these classes, unless it came with one."""
    if name in model.heads and list(map(str, model.get_labels(name))) == list(labels):
        model.active_head = name
        return
    if name in model.heads:
        logger.warning("The head %r is for other classes: it is replaced by a new one", name)
    id2label = dict(enumerate(labels))
    model.add_image_classification_head(name, num_labels=len(labels), id2label=id2label, overwrite_ok=True)


# --- Training, evaluation, prediction --------------------------------------------------------------------------------


def choose(outputs: Any) -> np.ndarray:
    """The number of the most likely class of each row of the model's outputs."""
    return np.argmax(outputs[0] if isinstance(outputs, tuple) else outputs, axis=-1)


def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(evaluated.label_ids, choose(evaluated.predictions)))}


def train(trainer: Trainer, checkpoint: str | None) -> None:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: Trainer) -> None:
    metrics = trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def predict(trainer: Trainer, data: Dataset, files: Sequence[str], labels: Sequence[str]) -> None:
    """Writes the class of each image, and the metrics where the classes are known."""
    outputs = trainer.predict(data, metric_key_prefix="predict")
    metrics = outputs.metrics | {"predict_samples": len(data)}
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    if trainer.is_world_process_zero():
        chosen = zip(files, choose(outputs.predictions), strict=True)
        rows = "".join(f"{file}\t{labels[number]}\n" for file, number in chosen)
        (Path(trainer.args.output_dir) / "predictions.txt").write_text(f"image\tprediction\n{rows}", encoding="utf-8")


def list_files(data: Dataset) -> list[str]:
    """The path of each image, or its number where it has none."""
    paths = (row["path"] for row in data.cast_column("image", Image(decode=False))["image"])
    return [path or str(number) for number, path in enumerate(paths)]


def describe(trainer: Trainer, model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Writes the model card, and uploads it with the adapter if asked to."""
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "image-classification"}
    if data_args.dataset_name is not None:
        card |= {"dataset": data_args.dataset_name}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def main() -> None:
    model_args, data_args, training_args, adapter_args = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    training_args.remove_unused_columns = False  # the column of images becomes pixel values when it is read
    training_args.label_names = training_args.label_names or ["labels"]

    data = read_data(data_args, model_args, training_args.do_eval)
    splits = choose_splits(data, training_args)
    labels = list_labels(data)
    raw = {split: prepare(data[split], split, labels, data_args) for split in splits}
    processor, model = load_processor(model_args, data_args), load_model(model_args)
    ready = {split: show(part, processor, data_args.random_flip and split == "train") for split, part in raw.items()}

    name = Path(data_args.dataset_name or "images").name  # of a dataset org/name, the name
    ensure_head(model, name, labels)
    setup_adapter_training(model, adapter_args, name)
    ensure_head(model, name, labels)  # the loaded adapter may have brought a head for other classes
    trainer = (AdapterTrainer if adapter_args.train_adapter else Trainer)(
        model=model,
        args=training_args,
        data_collator=build_collator(model, data_args.image_size),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate(trainer)
    if training_args.do_predict:
        predict(trainer, ready["test"], list_files(raw["test"]), labels)
    describe(trainer, model_args, data_args)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_image_classification.py: {error}")
