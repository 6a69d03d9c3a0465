"""Trained models in use: Detector, folders of images, sharing, ONNX."""
