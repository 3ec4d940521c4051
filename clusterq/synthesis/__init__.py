"""Images without data: a frozen teacher, losses on its feature statistics, and two sources of images."""

from clusterq.synthesis.centroid_bank import CentroidBank
from clusterq.synthesis.generator import ConditionalNormGenerator, EmbeddingGenerator, build_generator
from clusterq.synthesis.objective import LossTerms, SynthesisObjective
from clusterq.synthesis.projection import project_statistics
from clusterq.synthesis.sources import BankSource, GeneratorSource
from clusterq.synthesis.stored import StoredImages
from clusterq.synthesis.teacher import Teacher, TeacherOutput, semantic_start

__all__ = [
    "BankSource",
    "CentroidBank",
    "ConditionalNormGenerator",
    "EmbeddingGenerator",
    "GeneratorSource",
    "LossTerms",
    "StoredImages",
    "SynthesisObjective",
    "Teacher",
    "TeacherOutput",
    "build_generator",
    "project_statistics",
    "semantic_start",
]
