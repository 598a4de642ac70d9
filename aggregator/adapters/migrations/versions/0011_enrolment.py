"""Enrolment tokens, what became of devices, and every certificate that was issued."""

from __future__ import annotations

import contextlib

from alembic import op
from cryptography import x509
from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    insert,
    select,
)

revision = "0011"
down_revision = "0010"

NAME = String(63).with_variant(String(63, collation="C"), "postgresql")


def upgrade() -> None:
    """Adds them; the certificates of devices in use are entered with what they say themselves."""
    op.add_column("devices", Column("state", String(16), nullable=False, server_default="active"))
    op.add_column("devices", Column("token_id", String(12)))
    certificates = op.create_table(
        "certificates",
        Column("serial", String(40), primary_key=True),
        Column("device_id", NAME, ForeignKey("devices.device_id"), nullable=False, index=True),
        Column("issued_at", Float, nullable=False),
        Column("expires_at", Float, nullable=False),
        Column("revoked_at", Float),
        Column("reason", Text, nullable=False),
    )
    op.create_table(
        "enrolment_tokens",
        Column("seq", Integer, primary_key=True),
        Column("token_id", String(12), nullable=False, unique=True),
        Column("secret_sha256", LargeBinary, nullable=False),
        Column("name", NAME, nullable=False),
        Column("labels", Text, nullable=False),
        Column("replaces", Boolean, nullable=False),
        Column("created_at", Float, nullable=False),
        Column("expires_at", Float, nullable=False),
        Column("created_by", Text, nullable=False),
        Column("revoked_at", Float),
        Column("used_at", Float),
        Column("key_id", String(64)),
    )
    op.create_index("enrolment_tokens_name", "enrolment_tokens", ["name"])
    devices = Table("devices", MetaData(), Column("device_id", NAME), Column("certificate", LargeBinary))
    connection = op.get_bind()
    for device_id, der in connection.execute(select(devices)).all():
        # What is no certificate lets nobody in: there is nothing to enter.
        with contextlib.suppress(ValueError):
            certificate = x509.load_der_x509_certificate(der)
            connection.execute(
                insert(certificates).values(
                    serial=f"{certificate.serial_number:x}",
                    device_id=device_id,
                    issued_at=certificate.not_valid_before_utc.timestamp(),
                    expires_at=certificate.not_valid_after_utc.timestamp(),
                    reason="",
                )
            )
