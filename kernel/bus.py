"""Mailboxes and topics: how processes talk, and how readers hear of changes.

Owner: the kernel creates and closes them; any thread may send.
Lock: one per mailbox, last in the lock order, held for one deque operation.
Not here: persistence, delivery to other machines.
"""

import threading
from collections import deque

from kernel.errors import MailboxClosed, WouldBlock
from kernel.message import Message, Priority


class Mailbox:
    """Bounded inbox: first in first out within a priority, commands first."""

    def __init__(self, capacity_messages: int) -> None:
        self.capacity_messages = capacity_messages
        self.dropped = 0  # guarded by _ready
        self._ready = threading.Condition()
        self._inbox: tuple[deque[Message], ...] = (deque(), deque())  # guarded by _ready; by Priority
        self._closed = False  # guarded by _ready

    def __len__(self) -> int:
        return sum(map(len, self._inbox))

    def offer(self, message: Message) -> None:
        """Append a message, wake a receiver. Where there is no room the oldest data goes, and is counted."""
        with self._ready:
            if self._closed:
                return
            if len(self) >= self.capacity_messages:
                (self._inbox[Priority.DATA] or self._inbox[Priority.COMMAND]).popleft()
                self.dropped += 1
            self._inbox[message.priority].append(message)
            self._ready.notify()

    def receive_nowait(self) -> Message:
        """The next message. Raises WouldBlock, MailboxClosed (once it is drained)."""
        with self._ready:
            return self._take()

    def wait_receive(self, timeout_s: float | None = None) -> Message:
        """Block for the next message. Raises WouldBlock when the time is up, MailboxClosed."""
        with self._ready:
            self._ready.wait_for(lambda: len(self) or self._closed, timeout_s)
            return self._take()

    def close(self) -> None:
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    def _take(self) -> Message:
        for queue in reversed(self._inbox):
            if queue:
                return queue.popleft()
        if self._closed:
            raise MailboxClosed("the mailbox is closed")
        raise WouldBlock("no message is waiting")


class Bus:
    """Topics: each message goes to every subscriber; a slow one loses its oldest, alone."""

    def __init__(self, capacity_messages: int) -> None:
        self.capacity_messages = capacity_messages
        self._lock = threading.Lock()
        self._subscribers: dict[str, tuple[Mailbox, ...]] = {}  # replaced under _lock, read without

    def subscribe(self, *topics: str) -> Mailbox:
        mailbox = Mailbox(self.capacity_messages)
        with self._lock:
            for topic in topics:
                self._subscribers[topic] = (*self._subscribers.get(topic, ()), mailbox)
        return mailbox

    def unsubscribe(self, mailbox: Mailbox) -> None:
        with self._lock:
            for topic, mailboxes in self._subscribers.items():
                self._subscribers[topic] = tuple(m for m in mailboxes if m is not mailbox)
        mailbox.close()

    def publish(self, message: Message) -> None:
        for mailbox in self._subscribers.get(message.topic, ()):
            mailbox.offer(message)
