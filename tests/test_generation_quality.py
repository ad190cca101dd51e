"""Measures of generated images on sets whose values are known."""

import numpy as np
import pytest
import torch

from dive_lib import class_training, classifiers, generation_quality as quality
from dive_lib.checkpoint import save_model
from dive_lib.image_encoder import Pixels
from dive_lib.train import TrainingConfig
from tests import class_world


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20000, 3))
    assert quality.frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert quality.frechet_distance(x, x + 2) == pytest.approx(12, abs=1e-6)
    assert quality.frechet_distance(x, 3 * x) == pytest.approx(3 * (3 - 1) ** 2, rel=0.05)


def test_inception_score_runs_from_one_to_the_number_of_classes():
    assert quality.inception_score(np.eye(5)) == pytest.approx(5, rel=1e-6)
    assert quality.inception_score(np.full((7, 5), 0.2)) == pytest.approx(1)


def test_precision_and_recall_tell_quality_from_variety():
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(0, 1, (200, 2)), rng.normal(50, 1, (200, 2))])
    half = rng.normal(0, 0.5, (200, 2))
    precision, recall = quality.precision_recall(real, half)
    assert precision > 0.95 and recall < 0.5
    assert quality.precision_recall(real, real) == (1, 1)
    precision, recall = quality.precision_recall(real, np.concatenate([real, half + 500]))
    assert precision == pytest.approx(2 / 3, abs=0.01) and recall == 1
    with pytest.raises(ValueError, match="neighbour"):
        quality.precision_recall(real[:3], half)


def test_orders_are_compared():
    rows = {"a": {"accuracy": 90, "frechet_distance": 2, "inception_score": 3, "precision": 0.5, "recall": 0.9},
            "b": {"accuracy": 50, "frechet_distance": 9, "inception_score": 2, "precision": 0.6, "recall": 0.1}}
    found = quality.orders(rows)
    assert found == {"frechet_distance": True, "inception_score": True, "precision": False, "recall": True}
    by_ap = {"a": rows["a"] | {"AP": 10}, "b": rows["b"] | {"AP": 30}}
    assert quality.orders(by_ap, "AP") == {key: not agrees for key, agrees in found.items()}


def test_equal_values_are_no_order():
    row = {"accuracy": 90, "frechet_distance": 2, "inception_score": 3, "precision": 0.5, "recall": 0.9}
    assert not any(quality.orders({"a": row, "b": row}).values())
    tied = quality.orders({"a": row, "b": row | {"accuracy": 10, "precision": 0.1, "recall": 0.8}})
    assert tied == {"frechet_distance": False, "inception_score": False, "precision": True, "recall": True}


def test_features_come_before_the_last_layer(tmp_path):
    torch.manual_seed(0)
    settings = {"kind": "resnet", "widths": [8, 12], "blocks": 1, "stem": "pixels"}
    network = classifiers.make(settings, channels=1, classes=5, image_size=8)
    save_model(tmp_path / "net", network, settings | {"channels": 1, "classes": 5, "image_size": 8})
    network = classifiers.load(tmp_path / "net")
    images = torch.randn(9, 1, 8, 8)
    features, probabilities = quality.read_images(network, images, batch=4)
    assert features.shape == (9, 12) and probabilities.sum(1) == pytest.approx(np.ones(9))
    torch.testing.assert_close(torch.from_numpy(probabilities).float(), network(images).softmax(1))
    row = quality.quality(network, images, images)
    assert row["frechet_distance"] == 0 and (row["precision"], row["recall"]) == (1, 1)


def test_a_dit_is_trained_on_the_data_or_does_not_fit_them(tmp_path, monkeypatch):
    data = class_world.make(tmp_path, monkeypatch)
    config = TrainingConfig(steps=3, lr=0.01, batch_size=4)
    architecture = {"transformer": class_world.TRANSFORMER, "std": 1.0}
    runs = [class_training.obtain(data, Pixels(), architecture, config) for _ in range(2)]
    assert len(runs[0][1]) == 3 and runs[0][1] == runs[1][1]
    assert runs[0][0].grid.classes == class_world.CLASSES and runs[0][0].vocabulary.std == pytest.approx(1, rel=0.2)
    with pytest.raises(ValueError, match=r"diffuses \(1, 16, 16\), the encoded images are \(1, 8, 8\)"):
        class_training.obtain(data, Pixels(), {"transformer": class_world.TRANSFORMER | {"sample_size": 16}}, config)
    with pytest.raises(FileNotFoundError, match="DiT-XL-2-256"):
        class_training.obtain(data, Pixels(), architecture, config, checkpoint="nowhere")
