"""Notes of how every test ended, written as they end, for whoever stops the run before it is over."""

import pytest
from gpu_models import note


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "/gpu/" not in report.nodeid or (report.when != "call" and report.passed):
        return
    reason = ""
    if report.failed:
        reason = str(report.longrepr).strip().splitlines()[-1] if report.longrepr else "failed"
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(getattr(crash, "message", reason)).strip()[:400]
    elif report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[-1])
    test = report.nodeid.rpartition("/")[-1]
    note("test", report.outcome, test=test, when=report.when, seconds=round(report.duration, 2), reason=reason)
