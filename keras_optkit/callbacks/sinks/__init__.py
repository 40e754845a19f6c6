"""Where `TrainingMonitor` writes to: TensorBoard, W&B, MLflow, Trackio, or a class of your own."""

from keras_optkit.callbacks.sinks.mlflow import MLflow
from keras_optkit.callbacks.sinks.sink import Opening, Sink
from keras_optkit.callbacks.sinks.tensorboard import TensorBoard
from keras_optkit.callbacks.sinks.trackio import Trackio
from keras_optkit.callbacks.sinks.wandb import WandB

__all__ = ["MLflow", "Opening", "Sink", "TensorBoard", "Trackio", "WandB"]
