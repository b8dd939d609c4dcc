"""A worker's endpoint, before each of whose first LOST commits of metadata another process changes the same.

Prints what became of it, and the metadata then. Its databases live in this process.
"""

import contextlib
import sys
import threading

LOST = 12


def main():
    answers = sys.stdout
    from nova_bridge.rpc import worker

    with contextlib.redirect_stdout(sys.stderr):
        conf = worker.configure(worker.parse(sys.argv[1:]))
        from nova_bridge.rpc.methods import catalogue
        from nova_bridge.rpc.serializer import Decoder, Encoder
        from nova_bridge.rpc.server import NovaDbEndpoint, Runner

        endpoint = NovaDbEndpoint(catalogue(), Runner(worker.Cells(conf.database.connection)))
        import sqlalchemy as sa
        from nova import context
        from nova.db.api import api, models

        engine = api.get_engine()
        models.BASE.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(sa.insert(models.Aggregate).values(id=1, uuid="u", name="one"))
            connection.execute(sa.insert(models.AggregateMetadata).values(aggregate_id=1, key="k", value="old"))
        others = list(range(LOST))

        def other():
            with engine.begin() as connection:
                connection.execute(sa.update(models.AggregateMetadata).values(value=str(others.pop())))

        def before_commit(_):
            if others and threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()

        sa.event.listen(engine, "commit", before_commit)
        call = Encoder().encode({"args": [context.get_admin_context(), 1, {"k": "mine"}], "kwargs": {}})
        answer = endpoint.run_object_method({}, "nova.objects.aggregate", "_metadata_add_to_db", call)
        outcome = "done" if "error" not in answer else type(Decoder(None).decode(answer["error"])).__name__
        with engine.connect() as connection:
            values = connection.execute(sa.select(models.AggregateMetadata.value)).scalars().all()
    print(outcome, *values, file=answers, flush=True)


if __name__ == "__main__":
    main()
