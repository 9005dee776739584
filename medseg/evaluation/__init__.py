"""Label maps against references: pairs, metrics, statistics, a report, and methods against each
other.
"""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.evaluation.comparison import Comparison as Comparison, compare as compare
    from medseg.evaluation.lesions import LesionOptions as LesionOptions
    from medseg.evaluation.metrics import score_titles as score_titles, title_of as title_of
    from medseg.evaluation.pairs import (
        chosen_labels as chosen_labels,
        find_table as find_table,
        parse_structures as parse_structures,
        scored_names as scored_names,
        table_for as table_for,
        table_in as table_in,
    )
    from medseg.evaluation.ranking import write_ranking as write_ranking
    from medseg.evaluation.reading import (
        read_label_map as read_label_map,
        refuse_folder as refuse_folder,
    )
    from medseg.evaluation.scoring import (
        evaluate as evaluate,
        evaluation_of as evaluation_of,
        score_pairs as score_pairs,
        write_evaluation as write_evaluation,
    )
    from medseg.evaluation.summary import (
        Evaluation as Evaluation,
        EvaluationOptions as EvaluationOptions,
        read_scores as read_scores,
        summarise as summarise,
        summary_table as summary_table,
    )

__getattr__, __dir__ = door(
    __name__,
    {
        "comparison": ("Comparison", "compare"),
        "lesions": ("LesionOptions",),
        "metrics": ("score_titles", "title_of"),
        "pairs": (
            "chosen_labels",
            "find_table",
            "parse_structures",
            "scored_names",
            "table_for",
            "table_in",
        ),
        "reading": ("read_label_map", "refuse_folder"),
        "ranking": ("write_ranking",),
        "scoring": ("evaluate", "evaluation_of", "score_pairs", "write_evaluation"),
        "summary": ("Evaluation", "EvaluationOptions", "read_scores", "summarise", "summary_table"),
    },
)
