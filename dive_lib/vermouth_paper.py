"""Vermouth's published results (README tables of the published code), which stand beside ours; percent."""

FEW_SHOT_SETS = ("Pets", "Flowers102", "Aircraft", "DTD", "EuroSAT", "Cars", "Food101", "SUN397", "Caltech101",
                 "UCF101", "ImageNet")
FEW_SHOT = {
    "MAE-L": (91.87, 92.04, 36.51, 63.74, 87.39, 24.15, 59.31, 62.08, 94.45, 76.55, 39.74),
    "BEiTv3-G": (93.79, 97.84, 38.34, 72.41, 86.11, 62.58, 74.42, 71.57, 96.9, 84.38, 86.95),
    "SwinV2-L": (89.65, 99.61, 29.13, 73.1, 86.9, 37.75, 77.41, 72.63, 97.01, 81.06, 78.84),
    "DINO-B": (89.32, 97.82, 48.3, 69.0, 91.15, 57.17, 58.5, 62.44, 95.57, 76.97, 67.66),
    "Vermouth": (66.13, 92.35, 42.52, 66.62, 88.93, 51.05, 45.78, 58.09, 95.83, 70.49, 55.89),
}
"""Accuracy with 16 shots. The published training conditions the U-Net on the true class; ours never does."""

RETRIEVAL_SETS = ("Sketchy", "TU-Berlin", "QuickDraw")
RETRIEVAL = {
    "MAE-L": (39.23, 41.99, 11.71), "BEiTv3-G": (54.54, 50.93, 13.67), "SwinV2-L": (43.39, 45.51, 12.08),
    "DINO-B": (38.51, 25.49, 10.15), "Vermouth": (56.8, 52.83, 15.11),
}
"""mAP@all of zero-shot sketch-based retrieval."""

SEGMENTATION_SETS = ("ADE-150", "PC-59", "VOC-20", "ADE-847", "PC-459")
SEGMENTATION = {
    "MAE-L": (17.5, 53.27, 93.51, 3.42, 8.82), "ConvNeXt-L": (18.65, 53.42, 94.62, 3.53, 9.53),
    "SwinV2-L": (18.8, 53.37, 94.76, 3.8, 9.42), "DINO-B": (17.13, 47.84, 92.44, 3.16, 7.75),
    "Vermouth": (19.0, 52.88, 92.87, 3.7, 9.0),
}
"""mIoU of open-vocabulary segmentation."""


def table(rows: dict[str, tuple[float, ...]], sets: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """{set: {method: value}}, which pandas shows with a row for each method."""
    return {name: {method: values[k] for method, values in rows.items()} for k, name in enumerate(sets)}
