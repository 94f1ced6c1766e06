from dataclasses import replace

from pipelines.evaluation.evaluate import Scores

SCORES = Scores(10.0, 5.0, 50.0, 0.97, 1.0, 359, 1, "e", "d", {"steps": 50})


def test_scores_in_words_name_accuracy_only_for_models_with_classes():
    accuracy, distance = SCORES.lines()
    assert accuracy == ("accuracy", "0.9700 of 359 samples (real test: 1.0000)")
    assert distance == ("distance", "Frechet 10.00 = 2.00 times the floor 5.00 of real test images (noise: 50)")
    assert replace(SCORES, class_accuracy=None).lines() == [distance]
