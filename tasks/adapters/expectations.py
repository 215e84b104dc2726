"""Judgement of the rows by a great-expectations suite, and its Data Docs as one page that fetches nothing.

Importing this module takes seconds, because great-expectations does: stages import it when they need it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd
from great_expectations.core import ExpectationSuiteValidationResult
from great_expectations.data_context.types.base import (
    DataContextConfig,
    InMemoryStoreBackendDefaults,
    ProgressBarsConfig,
)
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import MulticolumnMapExpectation
from great_expectations.expectations.metrics.map_metric_provider import (
    MulticolumnMapMetricProvider,
    multicolumn_condition_partial,
)
from great_expectations.render.renderer import ValidationResultsPageRenderer
from great_expectations.render.view import DefaultJinjaPageView

from tasks.adapters.row_facts import NEEDS_NO_CLIPPING, Finding, Limits, RowFacts
from vzero_core.errors import InputError
from vzero_core.views import Box, clip_box

BOX_COLUMNS = ["x1", "y1", "x2", "y2", "width", "height"]
_TEXT = "object"
_TEXTS = ("id", "question", "image", "problem", "special_token", "crop_problem", "overlap", "source", "license")
_TYPES = {
    # Whole numbers that may be missing are floats in a table of pandas.
    **{name: _TEXT if name in _TEXTS else "float64" for name in RowFacts.model_fields},
    "row": "int64",
    "has_evidence": "bool",
}


@dataclass(frozen=True)
class Judgement:
    """What the suite found: reasons by row number, figures by expectation, and all of it for the Data Docs."""

    reasons: dict[int, str]
    findings: list[Finding]
    result: ExpectationSuiteValidationResult


@dataclass(frozen=True)
class _Check:
    """An expectation on rows and what is said to the one who has to mend a row."""

    name: str
    expectation: Any
    reason: Callable[[dict[str, Any]], str]


class BoxMeetsImageMetric(MulticolumnMapMetricProvider):
    """Whether boxes have an area inside their images: what `vzero_core.views.clip_box` asks, for whole columns."""

    condition_metric_name = "multicolumn_values.box_meets_image"
    condition_domain_keys = ("batch_id", "table", "column_list", "row_condition", "condition_parser", "ignore_row_if")
    condition_value_keys = ()

    @multicolumn_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_list: pd.DataFrame, **_: Any) -> pd.Series:  # noqa: N805
        x1, y1, x2, y2, width, height = (column_list[name] for name in BOX_COLUMNS)
        has_area = (x1 < x2) & (y1 < y2)
        meets = (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)
        return has_area & meets


class ExpectBoxToMeetImage(MulticolumnMapExpectation):
    """Expect boxes to be xyxy with an area, at least a part of it inside the image."""

    map_metric = "multicolumn_values.box_meets_image"
    args_keys = ("column_list",)


class BoxInsideImageMetric(MulticolumnMapMetricProvider):
    """Whether boxes lie inside their images without being clipped."""

    condition_metric_name = "multicolumn_values.box_inside_image"
    condition_domain_keys = BoxMeetsImageMetric.condition_domain_keys
    condition_value_keys = ()

    @multicolumn_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column_list: pd.DataFrame, **_: Any) -> pd.Series:  # noqa: N805
        x1, y1, x2, y2, width, height = (column_list[name] for name in BOX_COLUMNS)
        return (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)


class ExpectBoxToLieInsideImage(MulticolumnMapExpectation):
    """Expect boxes to need no clipping."""

    map_metric = "multicolumn_values.box_inside_image"
    args_keys = ("column_list",)


def judge(facts: Sequence[RowFacts], limits: Limits) -> Judgement:
    """Run the suite over all rows.

    Args:
        facts: at least one row.
        limits: what rows are held to.
    """
    columns = list(RowFacts.model_fields)
    table = pd.DataFrame([fact.model_dump() for fact in facts], columns=columns).astype(_TYPES)
    checks = _checks(limits)
    # The defaults would leave a temporary folder behind at each run.
    stores = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
    context = gx.get_context(mode="ephemeral", project_config=DataContextConfig(store_backend_defaults=stores))
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("vzero").add_dataframe_asset("rows")
    batch = asset.add_batch_definition_whole_dataframe("all")
    expectations = [*_of_the_table(columns), *(check.expectation for check in checks)]
    suite = context.suites.add(gx.ExpectationSuite("training rows", expectations=expectations))
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name="training rows", data=batch, suite=suite)
    )
    result = definition.run(
        batch_parameters={"dataframe": table},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},
    )
    return _read(result, checks, {fact.row: fact.model_dump() for fact in facts})


def _of_the_table(columns: list[str]) -> list[Any]:
    typed = [(name, kind) for name, kind in _TYPES.items() if kind != _TEXT]
    return [
        gxe.ExpectTableColumnsToMatchOrderedList(column_list=columns),
        *(gxe.ExpectColumnValuesToBeOfType(column=name, type_=kind) for name, kind in typed),
    ]


def _checks(limits: Limits) -> list[_Check]:
    checks = [
        _null("image can be read", "problem", lambda row: str(row["problem"])),
        _null(
            "id is unique",
            "same_id_as_row",
            lambda row: f"id must be unique, but row {row['same_id_as_row']} has it too; rename one of them",
        ),
        _Check(
            "question is not empty",
            gxe.ExpectColumnValuesToMatchRegex(column="question", regex=r"\S"),
            lambda row: f"question must be a text that is not empty, got {row['question']!r}",
        ),
        _null(
            "question holds no special token",
            "special_token",
            lambda row: (
                f"question must not hold special tokens of the models, got {row['special_token']!r}; it would change "
                "the prompt's structure: remove it"
            ),
        ),
        _Check(
            "box has an area inside the image",
            ExpectBoxToMeetImage(column_list=BOX_COLUMNS, ignore_row_if="any_value_is_missing"),
            _box_reason,
        ),
        _Check(
            "region is not too large",
            gxe.ExpectColumnValuesToBeBetween(column="region_share", max_value=limits.max_region_share),
            lambda row: (
                f"region must cover at most {limits.max_region_share:.0%} of the image (data.max_region_share), "
                f"got {row['region_share']:.0%}; draw it closer"
            ),
        ),
        _null(
            "row is no duplicate",
            "same_as_row",
            lambda row: f"row must not repeat another, but row {row['same_as_row']} has the same picture and question",
        ),
        _null(
            "image is in no evaluation data",
            "overlap",
            lambda row: f"image must not be in evaluation data, but it is that of {row['overlap']}; remove the row",
        ),
        _null("an irrelevant crop fits beside the region", "crop_problem", lambda row: str(row["crop_problem"])),
        _tokens("student", "student_tokens", limits.max_student_tokens),
        _tokens("teacher, relevant crop", "positive_tokens", limits.max_teacher_tokens),
        _tokens("teacher, irrelevant crop", "negative_tokens", limits.max_teacher_tokens),
        _warning(NEEDS_NO_CLIPPING, ExpectBoxToLieInsideImage, column_list=BOX_COLUMNS),
        _warning("source is named", gxe.ExpectColumnValuesToNotBeNull, column="source"),
        _warning("licence is named", gxe.ExpectColumnValuesToNotBeNull, column="license"),
    ]
    if limits.region_required:
        checks.append(
            _Check(
                "region or crops are given",
                gxe.ExpectColumnValuesToBeInSet(column="has_evidence", value_set=[True]),
                lambda _: (
                    "row must have a region, or both crops, got none; add them, or let [regions] propose a region"
                ),
            )
        )
    for check in checks:
        check.expectation.meta = {"name": check.name}
        check.expectation.description = f"{check.name[0].upper()}{check.name[1:]}"
    return checks


def _null(name: str, column: str, reason: Callable[[dict[str, Any]], str]) -> _Check:
    return _Check(name, gxe.ExpectColumnValuesToBeNull(column=column), reason)


def _tokens(who: str, column: str, limit: int | None) -> _Check:
    return _Check(
        f"prompt fits the {who}",
        gxe.ExpectColumnValuesToBeBetween(column=column, max_value=limit, min_value=1),
        lambda row: (
            f"prompt must have at most {limit} tokens ({who}), got {row[column]}; make the image smaller, shorten the "
            "question, or raise data.max_prompt_tokens as far as the model's context allows"
        ),
    )


def _warning(name: str, expectation: Any, **arguments: Any) -> _Check:
    if expectation is ExpectBoxToLieInsideImage:
        arguments["ignore_row_if"] = "any_value_is_missing"
    return _Check(name, expectation(severity="warning", **arguments), lambda _: name)


def _box_reason(row: dict[str, Any]) -> str:
    try:
        clip_box(Box(row["x1"], row["y1"], row["x2"], row["y2"]), row["width"], row["height"])
    except InputError as error:
        return str(error)
    raise AssertionError("expectation and clip_box must agree")


def _read(result: ExpectationSuiteValidationResult, checks: list[_Check], rows: dict[int, dict[str, Any]]) -> Judgement:
    by_name = {found.expectation_config.meta.get("name"): found for found in result.results}
    broken = [found for found in result.results if found.exception_info.get("raised_exception")]
    assert not broken, f"an expectation could not be evaluated: {broken[0].exception_info}"
    of_table = [found for found in result.results if "name" not in found.expectation_config.meta]
    assert all(found.success for found in of_table), "the table of facts must have the columns and types of RowFacts"
    reasons: dict[int, list[str]] = {}
    findings = []
    for check in checks:
        found = by_name[check.name]
        numbers = [int(entry["row"]) for entry in found.result["unexpected_index_list"] or ()]
        severity = str(check.expectation.severity.value)
        findings.append(
            Finding(
                name=check.name,
                expectation=found.expectation_config.type,
                severity=severity,
                num_rows=len(numbers),
            )
        )
        if severity == "critical":
            for number in numbers:
                reasons.setdefault(number, []).append(check.reason(rows[number]))
    return Judgement({number: "; ".join(found) for number, found in sorted(reasons.items())}, findings, result)


def data_docs(result: ExpectationSuiteValidationResult) -> str:
    """Render the Data Docs of a validation as one page: great-expectations' own, less all that it would fetch."""
    page = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result))
    page = str(page if isinstance(page, str) else page[0])
    for pattern in (
        r"<script\b.*?</script>",
        r"<link\b[^>]*>",
        r"<img\b[^>]*>",
        r"<footer\b.*?</footer>",
        r'<a\b[^>]*href="https?:[^>]*>.*?</a>',
        r"@import[^;]*;|url\([^)]*\)",
    ):
        page = re.sub(pattern, "", page, flags=re.DOTALL)
    return page.replace("</head>", f"{_POLICY}<style>{_STYLE}</style></head>", 1)


# Nothing may be loaded and nothing may run, whatever stands in the data.
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h4 { font-size: 1.6rem; margin: .5rem 0; }
h5 { font-size: 1.2rem; margin: 1.5rem 0 .5rem; }
h6 { font-size: 1rem; margin: 1rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
td, th { border-bottom: 1px solid #8884; padding: .25rem .5rem; text-align: left; vertical-align: top; }
ul, ol { padding-left: 1.2rem; }
.badge { border: 1px solid #8886; border-radius: .3rem; padding: 0 .3rem; }
.text-danger { color: #c0392b; } .text-success { color: #1e8449; }
.fa-times::before { content: "\\2717"; } .fa-check-circle::before { content: "\\2713"; }
/* What needs the site around the page, or its scripts. */
.sticky-top, .sticky > .mb-3, a[data-toggle], .collapse { display: none; }
a[href^="../"] { color: inherit; pointer-events: none; text-decoration: none; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd; } a { color: #8ab4f8; } }
"""
