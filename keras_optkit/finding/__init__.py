"""Finding a learning rate and a batch size for a model, which is afterwards as it was found."""

from keras_optkit.finding.batch_size import BatchSizes, Measured, find_batch_size
from keras_optkit.finding.learning_rate import LearningRates, find_learning_rate

__all__ = ["BatchSizes", "LearningRates", "Measured", "find_batch_size", "find_learning_rate"]
