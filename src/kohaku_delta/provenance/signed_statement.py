"""The statement in somebody's provenance.json, as far as it is read: statement.py writes it."""

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from kohaku_delta.strict_model import PartialModel, parse_json


class _Resource(PartialModel):
    name: str
    digest: dict[str, str]
    uri: str = ""


Resources = Annotated[list[_Resource], FailFast()]


class _Step(PartialModel):
    name: str
    products: Resources


class _External(PartialModel):
    values: dict[str, Any] = Field(alias="params.yaml")


class _Internal(PartialModel):
    steps: Annotated[list[_Step], FailFast()]


class _Definition(PartialModel):
    externalParameters: _External
    internalParameters: _Internal
    resolvedDependencies: Resources


class _Predicate(PartialModel):
    buildDefinition: _Definition


class SignedStatement(PartialModel):
    """subject: all outputs; the predicate has them again, by stage."""

    predicateType: Literal["https://slsa.dev/provenance/v1"]
    subject: Resources
    predicate: _Predicate

    @property
    def parameters(self) -> dict[str, Any]:
        """The content of params.yaml."""
        return self.predicate.buildDefinition.externalParameters.values

    @property
    def dependencies(self) -> list[_Resource]:
        """Inputs, files of the repository and its commit."""
        return self.predicate.buildDefinition.resolvedDependencies

    @property
    def outputs(self) -> dict[str, str]:
        """Output → sha256."""
        return {each.name: each.digest.get("sha256", "") for each in self.subject}

    @property
    def stages(self) -> dict[str, list[str]]:
        """Stage → its outputs."""
        steps = self.predicate.buildDefinition.internalParameters.steps
        return {step.name: [out.name for out in step.products] for step in steps}

    @property
    def commit(self) -> str | None:
        return next((each.digest["gitCommit"] for each in self.dependencies if "gitCommit" in each.digest), None)


def parse_statement(name: str, payload: bytes, remedy: str) -> SignedStatement:
    """The payload of a DSSE envelope. name: of the file, for messages. Raises UserError if it is no such statement."""
    return parse_json(name, SignedStatement, payload, remedy)
