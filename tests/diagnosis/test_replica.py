"""What the diagnosis believes of an engine's settings is what the engine does."""

from stallscope.diagnosis.replica import FIRST_COME
from stallscope_engine.config import EngineConfig
from stallscope_engine.policies import BY_NAME
from stallscope_engine.policies.queues import ArrivalQueue


def test_first_come_are_the_policies_whose_queue_is_in_the_order_of_arrival() -> None:
    queues = {name: policy(EngineConfig(policy=name)).waiting for name, policy in BY_NAME.items()}
    assert {name for name, queue in queues.items() if isinstance(queue, ArrivalQueue)} == set(FIRST_COME)
