#!/usr/bin/env bun
/**
 * The TCP server and client from "Foundations of Python Network Programming" (second edition,
 * Python 2), ported to Bun. They exchange sixteen-byte messages.
 *
 *     bun tcp_local.ts server
 *     bun tcp_local.ts client 127.0.0.1
 *
 * TCP carries a stream of bytes and knows nothing about messages: what is sent in one piece may
 * arrive in several, and several pieces may arrive as one. In Python, a loop around the blocking
 * `recv` puts a message back together. Bun has no `recv`: it hands each piece to a `data` handler
 * as it arrives.
 *
 * The rest of this file, below the program, provides the socket that such a loop needs: a
 * `Connection`, whose `recv` can be awaited. What the comments say about Bun was observed in Bun
 * 1.4.5 on Linux. Bun 1.4.0 and older versions can lose what arrived just before a reset.
 */
import type { Socket, SocketHandler, TCPSocketListener } from "bun";

/** The TCP port that the Python program uses. */
export const PORT = 1060;

/**
 * Receives exactly `length` bytes and resolves to a new buffer that holds them. `sock` is anything
 * with a `recv(maxLength)` that resolves to between 1 and `maxLength` bytes, or to an empty array
 * at the end of the stream.
 *
 * Never asks `recv` for more bytes than the message still needs: whatever follows the message is
 * left for the next call. A `length` of 0 reads nothing. A timeout on `sock` applies to each
 * `recv`, not to the whole message.
 *
 * Rejects with an `EOFError` if the stream ends first, and with `recv`'s own error if `recv`
 * rejects. After an `EOFError` or an error from `recv`, even a timeout, close the connection: the
 * part of the message that has arrived can no longer be received. There is one exception: if a
 * `Connection` refuses the call because another call is receiving, nothing is lost.
 *
 * Rejects with a `RangeError` if `length` is not a non-negative integer, and with a `TypeError` if
 * `recv` resolves to anything but bytes.
 *
 * The whole buffer is allocated up front. If `length` comes from the peer, check it against a limit
 * first.
 */
export function recvAll(
  sock: { recv(maxLength: number): Promise<Uint8Array> },
  length: number,
): Promise<Buffer> {
  if (sock instanceof Connection && sock.recv === ORIGINAL_RECV) {
    // For speed, a message that has arrived in full is taken in one step, without the loop.
    const whole = sock.tryRecvAll(length);
    if (whole !== undefined) return Promise.resolve(whole);
  }
  return recvInPieces(sock, length);
}

/** The loop around `recv`, as in Python. */
async function recvInPieces(
  sock: { recv(maxLength: number): Promise<Uint8Array> },
  length: number,
): Promise<Buffer> {
  if (!Number.isInteger(length) || length < 0) {
    throw new RangeError(`length must be a non-negative integer, not ${length}`);
  }
  if (length === 0) {
    // A loop of calls that receive nothing must yield to the event loop, too.
    const mustYield = countCall();
    if (mustYield) await eventLoopTurn();
  }
  const data = Buffer.alloc(length);
  let received = 0;
  while (received < length) {
    const chunk = await sock.recv(length - received);
    // An untyped `recv` could resolve to a string, which `data.set` would accept.
    if (!(chunk instanceof Uint8Array)) throw new TypeError("recv must resolve to bytes");
    if (chunk.length === 0) throw new EOFError(data.subarray(0, received), length);
    data.set(chunk, received);
    received += chunk.length;
  }
  return data;
}

/** The stream ended before the message did. */
export class EOFError extends Error {
  override readonly name = "EOFError";
  /** The part of the message that arrived. It is empty if the stream ended between messages. */
  readonly partial: Buffer;
  /** The length of the whole message, in bytes. */
  readonly expected: number;

  constructor(partial: Buffer, expected: number) {
    super(`socket closed ${partial.length} bytes into a ${expected}-byte message`);
    this.partial = partial;
    this.expected = expected;
  }
}

/**
 * Answers every client that connects to `host` and prints what the Python program prints. Unlike
 * that program, this server handles clients concurrently and keeps running when one of them fails.
 * A client that stays silent for `timeout` seconds is disconnected. Resolves to Bun's listener, and
 * rejects as `listen` does.
 */
export async function server(
  host: string,
  port: number = PORT,
  timeout: number = 60,
): Promise<TCPSocketListener<Connection>> {
  const listener = await listen(host, port, serve, timeout);
  const address = new Address(listener.hostname, listener.port);
  console.log(`Listening at ${address}`);

  // `sc` and `message` keep their names from the Python program. When this first runs, `address`
  // has been initialized, because clients are accepted in a later turn of the event loop.
  async function serve(sc: Connection): Promise<void> {
    console.log(`We have accepted a connection from ${sc.peername}`);
    console.log(`Socket connects ${sc.sockname} and ${sc.peername}`);
    const message = await recvAll(sc, 16);
    console.log(`The incoming sixteen-octet message says ${repr(message)}`);
    await sc.sendAll("Farewell, client");
    sc.close();
    console.log("Reply sent, socket closed");
    console.log(`Listening at ${address}`); // Python's loop prints this before each `accept`.
  }

  return listener;
}

/**
 * Sends a message to the server at `host`, receives the reply, and prints what the Python program
 * prints. `timeout`, in seconds, limits how long connecting may take, and then how long the server
 * may stay silent. Rejects as `connect`, `sendAll` and `recvAll` do.
 */
export async function client(
  host: string,
  port: number = PORT,
  timeout: number = 60,
): Promise<void> {
  using s = await connect(host, port, timeout); // Closes `s` at the end, like `with` in Python 3.
  console.log(`Client has been assigned socket name ${s.sockname}`);
  await s.sendAll("Hi there, server");
  const reply = await recvAll(s, 16);
  console.log(`The server said ${repr(reply)}`);
}

/**
 * Runs the program in the mode given on the command line and resolves to the exit status. In server
 * mode, it resolves only if the server cannot start.
 */
export async function main(args: string[]): Promise<number> {
  const mode = args[0];
  const host = args[1] ?? "127.0.0.1";
  try {
    if (mode === "server" && args.length <= 2) {
      await server(host);
      await new Promise(() => {}); // The server runs until a signal ends it.
    } else if (mode === "client" && args.length <= 2) {
      await client(host);
    } else {
      console.error("usage: tcp_local.ts server|client [host]");
      return 2;
    }
    return 0;
  } catch (error) {
    const message = (error as Error).message;
    console.error(`tcp_local.ts: ${message}`);
    return 1;
  }
}

// ---- The socket with a `recv`, which Python has built in and Bun lacks ------------------------

/** What the error codes mean. `DNS_` codes are Bun's; the rest are named after the system's. */
const REASONS: Record<string, string> = {
  DNS_EAI_AGAIN: "temporary failure in name resolution",
  DNS_EBADFAMILY: "address family for hostname not supported",
  DNS_ENOTFOUND: "name or service not known",
  EACCES: "permission denied",
  EADDRINUSE: "address already in use",
  EADDRNOTAVAIL: "address not available",
  EBADF: "the connection is closed",
  ECONNABORTED: "the connection was cut off",
  ECONNREFUSED: "connection refused or host unreachable", // Bun has one code for both
  ECONNRESET: "connection reset by peer",
  EHOSTUNREACH: "host unreachable",
  EPIPE: "broken pipe",
  ETIMEDOUT: "timed out",
};

/**
 * A socket call failed, and `code` says why:
 *
 * - `ETIMEDOUT`: The timeout expired.
 * - `ECONNREFUSED`: Nothing listens at that address, or the system could not reach the host.
 * - `ECONNRESET`: The peer reset the connection.
 * - `EPIPE`: This side has called `shutdown`, an earlier `sendAll` failed and left the stream
 *   incomplete, or the peer reset the connection after the end of its stream had arrived.
 * - `EHOSTUNREACH`: The peer has vanished or can no longer be reached.
 * - `EBADF`: This side has called `close` or `abort`.
 * - `ECONNABORTED`: The connection was cut off on this side, by `stop(true)` on Bun's listener or
 *   by the system (with `ss -K`, for example). After `shutdown`, `stop(true)` causes no error:
 *   `recv` resolves to an empty buffer, as at the end of the peer's stream.
 *
 * Other codes, such as `EADDRINUSE`, come from the system or from Bun. If `connect` or `listen`
 * fails and Bun gives no code, `code` is empty.
 */
export class SocketError extends Error {
  override readonly name = "SocketError";
  readonly code: string;

  constructor(code: string, message: string = REASONS[code] ?? code, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}

/**
 * Returns the error to throw when Bun throws `cause`: a `SocketError` that says what could not be
 * done and why. If Bun complains about an invalid argument, the mistake is the caller's, and Bun's
 * own error is returned.
 */
function toError(summary: string, cause: unknown): unknown {
  if (cause instanceof TypeError || cause instanceof RangeError) return cause;
  const error = cause as NodeJS.ErrnoException;
  const code = error.code ?? "";
  const reason = REASONS[code] ?? error.message;
  return new SocketError(code, `${summary}: ${reason}`, { cause });
}

/**
 * If `error` is a `SocketError`, copies it into `blank` and returns `blank`. Returns any other
 * error unchanged.
 *
 * In Bun, the stack of an error created after an `await` lists the async functions that are
 * waiting, but not a module that waits at its top level, which is where `connect` and `listen` are
 * usually called. For this reason, they create a blank error before their first `await` and fill it
 * in if they fail. An uncaught error then points to the line that called them. It also shows the
 * right message, because Bun does not compose the text of a stack until it is first read. The
 * methods of a connection do not do this: they are called too often to create an error each time.
 */
function fillIn(blank: SocketError, error: unknown): unknown {
  if (!(error instanceof SocketError)) return error;
  return Object.assign(blank, { code: error.code, message: error.message, cause: error.cause });
}

/** The address of one end of a connection. As a string, it looks like a Python tuple. */
class Address {
  readonly host: string;
  readonly port: number;

  constructor(host: string, port: number) {
    this.host = host;
    this.port = port;
  }

  toString(): string {
    return `('${this.host}', ${this.port})`;
  }
}

function checkHost(host: string): void {
  if (typeof host !== "string") throw new TypeError(`host must be a string, not ${host}`);
}

function checkTimeout(timeout: number): void {
  const isPositive = typeof timeout === "number" && timeout > 0; // also false for NaN
  if (!isPositive) {
    throw new RangeError(`timeout must be a number of seconds above 0, not ${timeout}`);
  }
}

/** The longest delay that `setTimeout` supports, in seconds. A longer wait has no timer. */
const LONGEST_TIMEOUT = 2_147_483;

/**
 * A place where a call waits until a handler reports a change, like Python's `threading.Condition`,
 * but without the lock and for a single waiter.
 *
 * `notify` does nothing when nobody is waiting. Check the state before waiting, and again
 * afterwards.
 */
class Condition {
  #resolve: ((isNotified: boolean) => void) | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  get hasWaiter(): boolean {
    return this.#resolve !== undefined;
  }

  /** Resolves to true when `notify` is called, or to false after `timeout` seconds. */
  wait(timeout: number): Promise<boolean> {
    if (timeout <= LONGEST_TIMEOUT) {
      this.#timer = setTimeout(() => this.#onTimer(), timeout * 1000);
    }
    return new Promise((resolve) => {
      this.#resolve = resolve;
    });
  }

  notify(): void {
    this.#endWait(true);
  }

  #onTimer(): void {
    // If the process was busy, the timer may fire before Bun has read bytes that arrived in time.
    // One more turn of the event loop gives `notify` a chance to come first. A timer of 0 seconds
    // provides that turn. It replaces the first timer in `#timer`, where `#endWait` cancels it.
    this.#timer = setTimeout(() => this.#endWait(false), 0);
  }

  #endWait(isNotified: boolean): void {
    clearTimeout(this.#timer);
    this.#resolve?.(isNotified);
    this.#resolve = undefined;
  }
}

/** Pieces of at least this many bytes are freed once they have been copied: see `free`. */
const LARGE_PIECE = 16_384;

/**
 * Frees the memory of `bytes` at once instead of leaving it to the garbage collector, so that the
 * next piece can use it while it is still in the processor's cache. (Each piece that Bun delivers
 * has memory of its own.) On a server that exchanges messages of 64 KiB, this cuts processor time
 * by a tenth.
 */
function free(bytes: Buffer): void {
  const buffer = bytes.buffer;
  const isAlone = buffer.byteLength === bytes.length; // If not, other bytes would be destroyed.
  if (isAlone && buffer instanceof ArrayBuffer) buffer.transfer(0); // detaches the memory
}

/** What every `ReceiveBuffer` holds while it is empty. */
const NO_BYTES: Buffer = Buffer.alloc(0);

/** The bytes that have arrived but that `recv` has not returned yet. */
class ReceiveBuffer {
  #bytes = NO_BYTES;
  /** How many of `#bytes` have been taken. */
  #taken = 0;

  get length(): number {
    return this.#bytes.length - this.#taken;
  }

  /** Appends `bytes`. If the buffer is empty, keeps `bytes` itself, not a copy. */
  add(bytes: Buffer): void {
    if (this.length === 0) {
      this.#bytes = bytes;
    } else {
      const rest = this.#bytes.subarray(this.#taken);
      this.#bytes = Buffer.concat([rest, bytes]);
    }
    this.#taken = 0;
  }

  /**
   * The length up to and including the first `delimiter`, or 0 if the first `maxLength` bytes do
   * not contain it.
   */
  lengthUpTo(delimiter: Uint8Array, maxLength: number): number {
    const first = this.#bytes.subarray(this.#taken, this.#taken + maxLength);
    const index = first.indexOf(delimiter);
    return index < 0 ? 0 : index + delimiter.length;
  }

  /**
   * Takes up to `maxLength` bytes from the start, in a buffer that shares its memory with nothing
   * else. (Unlike Node's, Bun's `Buffer.concat` and `Buffer.copyBytesFrom` do not use a shared
   * pool.)
   */
  take(maxLength: number): Buffer {
    if (this.length === 0) return Buffer.alloc(0); // The caller could transfer `NO_BYTES` away.
    const bytes = this.#bytes;
    const isEverything = this.#taken === 0 && bytes.length <= maxLength;
    if (isEverything) {
      this.clear();
      return bytes;
    }
    const count = Math.min(maxLength, this.length);
    const first = Buffer.copyBytesFrom(bytes, this.#taken, count);
    this.#taken += count;
    if (this.length === 0) {
      this.clear();
      if (bytes.length >= LARGE_PIECE) free(bytes);
    }
    return first;
  }

  /** Releases memory if less than half of it is still needed. */
  compact(): void {
    if (this.length >= this.#bytes.length / 2) return;
    this.#bytes = Buffer.copyBytesFrom(this.#bytes, this.#taken);
    this.#taken = 0;
  }

  clear(): void {
    this.#bytes = NO_BYTES;
    this.#taken = 0;
  }
}

/** Lets in one caller at a time, in order of arrival, like Python's `asyncio.Lock`. */
class Lock {
  #isHeld = false;
  readonly #queue: (() => void)[] = [];

  get isHeld(): boolean {
    return this.#isHeld;
  }

  get hasWaiters(): boolean {
    return this.#queue.length > 0;
  }

  /**
   * If the lock is free, acquires it and returns undefined, so that the caller can go on without an
   * `await`. (Even an `await` with nothing to wait for lets other code run first.) Otherwise,
   * returns a promise that resolves when the lock has been acquired.
   */
  acquire(): Promise<void> | undefined {
    if (!this.#isHeld) {
      this.#isHeld = true;
      return undefined;
    }
    return new Promise((resolve) => {
      this.#queue.push(resolve);
    });
  }

  release(): void {
    // If calls are queued, the lock goes to the next one without being freed, so that no other call
    // can jump the queue.
    const next = this.#queue.shift();
    if (next) next();
    else this.#isHeld = false;
  }
}

/**
 * The promise of a call that does not have to wait settles without a turn of the event loop. A loop
 * of such calls would starve every other connection. To prevent that, every 64th call yields to the
 * event loop.
 */
const CALLS_PER_YIELD = 64;
let callsUntilYield = CALLS_PER_YIELD; // across all connections

/** Counts a call. Returns whether that call must yield to the event loop. */
function countCall(): boolean {
  callsUntilYield -= 1;
  if (callsUntilYield > 0) return false;
  callsUntilYield = CALLS_PER_YIELD;
  return true;
}

/** Returns whether the next call that is counted must yield. */
function mustNextCallYield(): boolean {
  return callsUntilYield === 1;
}

function eventLoopTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

/** Counts the failed call, so that a loop of failing calls also yields. Rejects with `error`. */
async function countAndReject(error: unknown): Promise<never> {
  const mustYield = countCall();
  if (mustYield) await eventLoopTurn();
  throw error;
}

/** How long a closed connection waits for the end of its peer's stream, in seconds. See `close`. */
const LINGER_TIME = 4;

/**
 * A TCP connection with the methods of a blocking socket: await `recv` and `sendAll` where Python's
 * `recv` and `sendall` block. If the connection fails, they reject with a `SocketError`, whose
 * documentation lists the codes.
 *
 * An open connection keeps the process alive. To close a connection automatically, declare it with
 * `using`:
 *
 *     using sock = await connect("127.0.0.1", 1060);
 *     await sock.sendAll("Hi there, server");
 *     const reply = await recvAll(sock, 16);
 *
 * The table shows what `recv` and `sendAll` do after each event, and what the peer sees as a
 * result. An "end" is the end of a stream. A "broken" connection is one that an error such as
 * `ECONNRESET` has ended. A "gap" means that data is missing from what this side has sent: see
 * `sendAll`.
 *
 * | after               | `recv`                        | `sendAll`        | the peer sees      |
 * | ------------------- | ----------------------------- | ---------------- | ------------------ |
 * | the peer's end      | gives the rest, then no bytes | sends            | no change          |
 * | a broken connection | gives the rest, then rejects  | rejects          | (depends on error) |
 * | a timeout, no gap   | receives                      | sends            | no change          |
 * | a gap               | receives                      | rejects: `EPIPE` | a reset at `close` |
 * | `shutdown`          | receives                      | rejects: `EPIPE` | this side's end    |
 * | `close`             | rejects: `EBADF`              | rejects: `EBADF` | this side's end    |
 * | `abort`             | rejects: `EBADF`              | rejects: `EBADF` | a reset            |
 *
 * If several rows apply, `close` and `abort` take precedence. For `recv`, the peer's end comes
 * next. For `sendAll`, a broken connection comes next, and then the rows that reject with `EPIPE`.
 * Once there is a gap, neither `shutdown` nor `close` sends an end. If the peer resets the
 * connection after its end has arrived, only `sendAll` reports it.
 */
export class Connection {
  /**
   * The address of this end. It is ('0.0.0.0', 0) if the peer reset the connection immediately.
   */
  readonly sockname: Address;
  /** The address of the peer. Like `sockname`, it is ('0.0.0.0', 0) after an immediate reset. */
  readonly peername: Address;

  /** Once Bun has closed it, its methods have no effect. */
  readonly #socket: Socket<Connection>;
  #timeout = Infinity;
  readonly #unread = new ReceiveBuffer();
  /** Whether a receiving call is pending. */
  #isReceiving = false;
  /** Held by the `sendAll` that is sending. The others queue for it. */
  readonly #sendLock = new Lock();
  /** Whether a `sendAll` has sent part of its data and is waiting to send the rest. */
  #isPartway = false;
  /** Whether a `sendAll` has left a gap: data is missing from the stream. */
  #hasGap = false;
  /** Whether `shutdown`, `close` or `abort` was called: this side sends no more. */
  #hasShutDown = false;
  /** Whether `close` or `abort` was called. */
  #hasClosed = false;
  /** Whether `abort` was called. */
  #hasAborted = false;
  /** Whether the end of the peer's stream has arrived. */
  #peerHasEnded = false;
  /** The code of the first error. It is empty until an error occurs. */
  #errorCode = "";
  /**
   * Whether Bun has closed the socket. If so, the peer's stream has ended, or there is an error
   * code.
   */
  #socketHasClosed = false;
  /**
   * Notified when a waiting `recv` must check again: bytes, the end of the stream or an error has
   * arrived, or this side has closed the connection.
   */
  readonly #arrival = new Condition();
  /**
   * Notified when a waiting `sendAll` must check again: the kernel has room, there is an error, or
   * this side has called `shutdown`, `close` or `abort`.
   */
  readonly #room = new Condition();
  #lingerTimer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Whether the connection has to end with a reset. An ordinary end would tell the peer that the
   * stream is complete.
   */
  get #mustReset(): boolean {
    return this.#isPartway || this.#hasGap || this.#hasAborted;
  }

  /**
   * Internal: the handlers that Bun calls. They find the connection in `socket.data`, which Bun
   * leaves free for the program to use.
   */
  static readonly handlers: SocketHandler<Connection> = {
    data: (socket, bytes) => socket.data.#onData(bytes),
    end: (socket) => socket.data.#onEnd(),
    close: (socket, error) => socket.data.#onClose(error),
    drain: (socket) => socket.data.#room.notify(),
  };

  /**
   * Internal: `socket` must be open and use `handlers`. The caller must store the connection in
   * `socket.data`.
   */
  constructor(socket: Socket<Connection>, timeout: number) {
    this.#socket = socket;
    this.timeout = timeout;
    // If the peer has already reset the connection, Bun has no addresses, whatever the types say.
    this.sockname = new Address(socket.localAddress ?? "0.0.0.0", socket.localPort ?? 0);
    this.peername = new Address(socket.remoteAddress ?? "0.0.0.0", socket.remotePort ?? 0);
    // After 60 seconds of silence, the kernel sends ten probes, a second apart, to see whether the
    // peer is still there. Bun fixes the number of probes and their interval, and takes the 60
    // seconds in milliseconds.
    socket.setKeepAlive(true, 60_000);
  }

  /**
   * How long, in seconds, a call may go without progress before it rejects with `ETIMEDOUT`.
   * Progress means that `recv` receives a byte, or that `sendAll` sends one. `Infinity`, like
   * Python's `None`, means that there is no limit. So does any number above 2,147,483. A change
   * applies to calls that begin after it. Setting anything but a number above 0 throws a
   * `RangeError`.
   *
   * Even without a timeout, calls reject with `EHOSTUNREACH` when the peer has vanished, for
   * example after a power failure. TCP keep-alive detects that after about 70 seconds of silence.
   * If data that was sent is still unacknowledged, Linux retransmits it instead of probing and
   * gives up after about 15 minutes.
   */
  get timeout(): number {
    return this.#timeout;
  }

  set timeout(timeout: number) {
    checkTimeout(timeout);
    this.#timeout = timeout;
  }

  #onData(bytes: Buffer): void {
    if (this.#hasClosed) return;
    this.#unread.add(bytes); // They need no copy: Bun does not reuse their memory.
    // Backpressure: if no `recv` is waiting, stop Bun from reading until the next one. What the
    // peer sends in the meantime fills the kernel's buffer, and then the peer has to wait. While
    // paused, Bun still reports a reset at once, and first delivers what the kernel holds. It
    // reports the peer's end only after `resume`.
    if (!this.#arrival.hasWaiter) this.#socket.pause();
    this.#arrival.notify();
  }

  #onEnd(): void {
    // An `end` after a failed write says nothing about the peer: Bun delivers the bytes that had
    // arrived earlier, and then always calls `end`.
    if (!this.#errorCode) this.#peerHasEnded = true;
    this.#arrival.notify();
  }

  #onClose(error?: NodeJS.ErrnoException): void {
    clearTimeout(this.#lingerTimer);
    this.#socketHasClosed = true;
    const hasSentEnd = this.#hasShutDown && !this.#mustReset;
    if (hasSentEnd && !error && !this.#errorCode) {
      // When both sides have ended their streams, Bun closes the socket without calling `end`
      // first. (Bun does the same after `stop(true)`, which therefore looks like the peer's end.)
      this.#peerHasEnded = true;
    } else if (error?.code === "ETIMEDOUT") {
      // The kernel has given up on the peer. If its code were passed on unchanged, the failure
      // would look like the connection's own timeout and invite the caller to try again.
      this.#fail("EHOSTUNREACH");
    } else {
      // If there is no `error`, either a write failed earlier, and `#fail` keeps its code, or
      // something on this side has closed the socket, such as `stop(true)` on the listener. (An
      // `error` without a code was never observed, but the types allow it.)
      this.#fail(error?.code ?? "ECONNABORTED");
    }
    this.#arrival.notify();
    this.#room.notify();
  }

  #fail(code: string): void {
    // Only the first error says what happened.
    if (!this.#errorCode) this.#errorCode = code;
  }

  /**
   * Lets other calls receive. `#receive` queues this as a microtask just before its promise
   * settles. Microtasks run in order: this one runs immediately before a caller that awaits the
   * promise resumes, and nothing runs in between. If it ran any earlier, other code could call
   * `recv` first and take the rest of the caller's message.
   *
   * `recv` and `recvUntil` must return the promise of `#receive` itself. If they were async
   * functions, their own promises would settle a few microtasks later, and other calls could
   * receive in the meantime.
   */
  readonly #endReceiving = (): void => {
    this.#isReceiving = false;
  };

  /**
   * Resolves to between 1 and `maxLength` bytes as soon as any have arrived, or to an empty buffer
   * at the end of the stream. The buffer belongs to the caller.
   *
   * If the connection breaks before the end of the stream, bytes that had already arrived can still
   * be received. After that, `recv` rejects. A timeout loses nothing: `recv` may be called again.
   *
   * Only one call may receive at a time. A second one rejects with a plain `Error` and leaves the
   * first undisturbed. Rejects with a `RangeError` if `maxLength` is not a positive integer.
   */
  recv(maxLength: number): Promise<Buffer> {
    return this.#receive(maxLength);
  }

  /**
   * Like `recv`, but waits for `delimiter`, such as "\r\n", and resolves to everything up to and
   * including its first occurrence. If the first `maxLength` bytes contain no delimiter, resolves
   * to those bytes. If the stream ends before a delimiter, resolves to what is left. A Python file
   * object's `readline(limit)` does the same with "\n".
   *
   * Check that the result ends with the delimiter. If it does not, the text is too long or was cut
   * off. Do not call again to get the rest: the limit may have fallen inside the delimiter, with
   * "\r" at the end of one result and "\n" at the start of the next. An empty result means that the
   * stream has ended and nothing is left.
   *
   * The timeout restarts whenever bytes arrive. A call that rejects because of a timeout or a reset
   * loses nothing. After a timeout, call again. After a reset, `recv` still gives the bytes that
   * had arrived. Choose a `maxLength` of kilobytes rather than megabytes, because everything
   * received so far is copied and searched again whenever more arrives.
   *
   * Rejects with a `RangeError` if `delimiter` is empty or `maxLength` is not a positive integer,
   * and with a `TypeError` if `delimiter` is neither a string nor bytes.
   */
  recvUntil(delimiter: string | Uint8Array, maxLength: number): Promise<Buffer> {
    return this.#receive(maxLength, { delimiter });
  }

  /**
   * Receives for `recv` and `recvUntil`, which return its promise itself: see `#endReceiving`.
   *
   * `until` is absent for `recv`. It wraps the delimiter in an object so that a call such as
   * `recvUntil(undefined, 99)` is not mistaken for a `recv`, but rejects with a `TypeError`.
   */
  async #receive(maxLength: number, until?: { delimiter: string | Uint8Array }): Promise<Buffer> {
    if (!Number.isInteger(maxLength) || maxLength < 1) {
      throw new RangeError(`maxLength must be a positive integer, not ${maxLength}`);
    }
    // Copy the delimiter, because the caller may change the original during the wait.
    const delimiter = until && Buffer.from(bytesOf(until.delimiter));
    if (delimiter?.length === 0) throw new RangeError("the delimiter must not be empty");
    if (this.#isReceiving) {
      return countAndReject(new Error("recv called while another recv is pending"));
    }
    this.#isReceiving = true;
    const timeout = this.#timeout;
    try {
      let length = this.#readyLength(maxLength, delimiter);
      while (length === 0) {
        if (this.#hasClosed) throw new SocketError("EBADF");
        if (this.#peerHasEnded) return this.#unread.take(maxLength); // what is left, if anything
        // An error alone is no reason to give up: after a failed write, bytes may still arrive.
        if (this.#socketHasClosed) throw new SocketError(this.#errorCode);
        // The few bytes that a `recvUntil` already has must not keep a large piece in memory.
        this.#unread.compact();
        // No handler can run between the checks above and this wait, so no `notify` is missed.
        this.#socket.resume();
        const isNotified = await this.#arrival.wait(timeout);
        if (!isNotified) throw new SocketError("ETIMEDOUT");
        length = this.#readyLength(maxLength, delimiter);
      }
      return this.#unread.take(length);
    } finally {
      const mustYield = countCall();
      if (mustYield) await eventLoopTurn();
      queueMicrotask(this.#endReceiving);
    }
  }

  /**
   * Internal: the part of `recvAll` that does not wait. If `length` bytes have arrived, returns
   * them in a buffer of their own. Otherwise, or if the call would have to reject or yield,
   * returns undefined and takes nothing.
   */
  tryRecvAll(length: number): Buffer | undefined {
    const hasArrived = Number.isInteger(length) && length > 0 && length <= this.#unread.length;
    if (!hasArrived || this.#isReceiving || mustNextCallYield()) return undefined;
    countCall();
    // Like any other call, this one is pending until its caller runs again: see `#endReceiving`.
    this.#isReceiving = true;
    queueMicrotask(this.#endReceiving);
    return this.#unread.take(length);
  }

  /** How many bytes a call may take now, or 0 if it has to wait for more. */
  #readyLength(maxLength: number, delimiter?: Uint8Array): number {
    const available = Math.min(this.#unread.length, maxLength);
    if (delimiter === undefined) return available;
    const length = this.#unread.lengthUpTo(delimiter, maxLength);
    if (length > 0) return length;
    return available === maxLength ? maxLength : 0;
  }

  /**
   * Iterates over what arrives, in pieces of at most 64 KiB, until the end of the stream. Throws
   * when `recv` rejects. Leaving the loop does not close the connection.
   */
  [Symbol.asyncIterator](): AsyncIterator<Buffer, void> {
    // This is not an async generator, because the stack of an error from a generator would not lead
    // back to the loop.
    return { next: () => this.#nextPiece() };
  }

  async #nextPiece(): Promise<IteratorResult<Buffer, void>> {
    const piece = await this.recv(65_536);
    if (piece.length === 0) return { done: true, value: undefined };
    return { done: false, value: piece };
  }

  /**
   * Sends all of `data`, encoding a string as UTF-8. Resolves when the kernel has accepted all of
   * it, which does not mean that the peer has received it. Do not modify `data` before the call
   * settles.
   *
   * Concurrent calls send one after another, in the order in which they were made. Time spent
   * waiting for another call does not count towards the timeout.
   *
   * A call that fails leaves a gap in the stream in two cases:
   *
   * - Part of its data was sent.
   * - None of its data was sent, but other calls are queued behind it. If those went on to send
   *   theirs, the peer could not tell that something is missing before it. After `shutdown` or
   *   `close`, they send nothing, and there is no gap.
   *
   * Once there is a gap, the queued calls and all later ones reject (with `EPIPE`, unless the
   * connection has broken or been closed as well), and `close` resets the connection, so that the
   * peer cannot mistake what it has received for the complete stream. Repeating a call that timed
   * out is therefore safe: if the first call left a gap, the second one rejects.
   *
   * The peer does not learn of a gap if the process exits without `close` or `abort`, or if
   * `stop(true)` is called on the listener. In both cases, the kernel may end the stream as if it
   * were complete.
   *
   * Rejects with a `TypeError` if `data` is neither a string nor bytes.
   */
  sendAll(data: string | NodeJS.ArrayBufferView | ArrayBufferLike): Promise<void> {
    // For speed, this is not an async function: most calls do not wait, but an async function would
    // allocate the memory for waiting anyway. As a result, errors must be turned into rejections by
    // hand.
    try {
      const bytes = bytesOf(data);
      // Keep the original length. If the caller transfers the buffer to a worker while `#sendRest`
      // waits, `bytes.length` becomes 0, and everything would seem to have been sent. With the
      // original length, `write` throws, and the call rejects.
      const length = bytes.length;
      if (this.#sendLock.isHeld) return this.#sendRest(bytes, 0, length);
      const sent = this.#write(bytes, 0, length);
      if (sent < length) return this.#sendRest(bytes, sent, length);
      // Yield only after sending, so that the data leaves in the same turn as the call.
      const mustYield = countCall();
      return mustYield ? eventLoopTurn() : Promise.resolve();
    } catch (error) {
      return countAndReject(error);
    }
  }

  /** The part of `sendAll` that waits. Of `length` bytes, the first `sent` have been sent. */
  async #sendRest(bytes: Uint8Array, sent: number, length: number): Promise<void> {
    const timeout = this.#timeout;
    const acquired = this.#sendLock.acquire();
    const wasQueued = acquired !== undefined;
    if (wasQueued) {
      await acquired;
      // Without this, a long queue would be sent in a single turn of the event loop.
      const mustYield = countCall();
      if (mustYield) await eventLoopTurn();
    }
    try {
      // A call that was queued makes its first attempt here. Any other has made it in `sendAll`.
      if (wasQueued) sent += this.#write(bytes, sent, length - sent);
      while (sent < length) {
        this.#isPartway = sent > 0;
        const isNotified = await this.#room.wait(timeout);
        // Bun reports room only when there is plenty, but a slow reader may free just a little.
        // When the time is up, try once more, and keep waiting if any bytes were accepted.
        const accepted = this.#write(bytes, sent, length - sent);
        if (accepted === 0 && !isNotified) throw new SocketError("ETIMEDOUT");
        sent += accepted;
      }
    } catch (error) {
      // If the queued calls went on to send their data, the peer could not tell that this call's is
      // missing. After `shutdown`, they send nothing. (`#isPartway` is as the last wait left it.)
      const othersFollow = this.#sendLock.hasWaiters && !this.#hasShutDown;
      if (this.#isPartway || othersFollow) this.#hasGap = true;
      throw error;
    } finally {
      this.#isPartway = false;
      this.#sendLock.release();
    }
  }

  /** Hands the kernel `count` bytes, starting at `start`. Returns how many the kernel accepted. */
  #write(bytes: Uint8Array, start: number, count: number): number {
    if (this.#hasClosed) throw new SocketError("EBADF");
    if (this.#errorCode) throw new SocketError(this.#errorCode);
    if (this.#hasShutDown) throw new SocketError("EPIPE", "this side has called shutdown");
    if (this.#hasGap) throw new SocketError("EPIPE", "an earlier sendAll failed");
    const accepted = this.#socket.write(bytes, start, count);
    if (accepted < 0) {
      // The peer has reset the connection. Bun does not pass on the kernel's code, which is
      // `EPIPE` if the peer had already ended its stream.
      this.#fail(this.#peerHasEnded ? "EPIPE" : "ECONNRESET");
      throw new SocketError(this.#errorCode);
    }
    return accepted;
  }

  /**
   * Closes only the sending side (a half-close), like Python's `shutdown(SHUT_WR)`. The peer
   * receives everything that was sent, and then the end of the stream. This side can still receive.
   * A `sendAll` that is still waiting, or that is called later, rejects with `EPIPE`.
   *
   * If the stream has a gap (see `sendAll`), or if `shutdown` interrupts a `sendAll` that has sent
   * part of its data, the peer sees no end. Instead, it sees a reset when the connection is closed.
   * Calling `shutdown` again, or after `close`, has no effect.
   */
  shutdown(): void {
    if (this.#hasShutDown) return;
    this.#hasShutDown = true;
    if (!this.#mustReset) this.#socket.shutdown();
    this.#room.notify(); // so that a pending `sendAll` rejects
  }

  /**
   * Closes the connection. The peer receives everything that was sent, and then the end of the
   * stream. If the stream has a gap (see `sendAll`), or if `close` interrupts a `sendAll` that has
   * sent part of its data, the peer sees a reset instead. Bytes not yet received are discarded, and
   * calls that are still waiting reject with `EBADF`. Closing again has no effect.
   *
   * The socket then lingers: it stays open and discards what arrives until the peer has ended its
   * stream as well. If the socket were closed while the peer was still sending, the kernel would
   * reset the connection, and data on its way to the peer would be lost. After 4 seconds, the
   * socket is closed even if the peer has not ended its stream, and a peer that sends anything
   * after that sees a reset and may lose what it has not yet read. Those 4 seconds are meant to be
   * long enough for a peer that is still sending to read this side's reply, and short enough that
   * silent peers do not pile up. A lingering connection keeps the process alive. (All this has
   * nothing to do with `SO_LINGER`.)
   */
  close(): void {
    if (this.#hasClosed) return;
    this.#hasClosed = true;
    this.#unread.clear();
    this.shutdown();
    this.#arrival.notify(); // so that a pending `recv` rejects
    if (this.#mustReset) {
      this.#socket.terminate(); // Bun's method for resetting a connection
    } else if (this.#peerHasEnded || this.#errorCode) {
      // There is nothing to linger for. `end` is Bun's method for closing a socket.
      this.#socket.end();
    } else {
      this.#socket.resume();
      this.#lingerTimer = setTimeout(() => this.#socket.end(), LINGER_TIME * 1000);
    }
  }

  /**
   * Closes the connection immediately, with a reset, which tells the peer that the stream is
   * incomplete. Data on its way to the peer may be lost, and calls that are still waiting reject
   * with `EBADF`. After `close`, `abort` ends a connection that is still lingering, but an end that
   * the peer has already seen cannot be taken back.
   */
  abort(): void {
    this.#hasAborted = true; // so that `close` resets the connection
    this.close();
    this.#socket.terminate(); // in case the connection is lingering after an earlier `close`
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/**
 * The `recv` of this file. If a program has replaced it, for example to count bytes, `recvAll`
 * calls the replacement.
 */
const ORIGINAL_RECV = Connection.prototype.recv;

function bytesOf(data: string | NodeJS.ArrayBufferView | ArrayBufferLike): Uint8Array {
  if (typeof data === "string") return Buffer.from(data);
  // These are bytes already, and another view of them would only cost time. If there are none, the
  // buffer may have been transferred away, and the last line then throws.
  if (data instanceof Uint8Array && data.length > 0) return data;
  if (data instanceof ArrayBuffer || data instanceof SharedArrayBuffer) return new Uint8Array(data);
  if (!ArrayBuffer.isView(data)) throw new TypeError(`expected a string or bytes, not ${data}`);
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

/**
 * Connects to a TCP server, like Python's `socket.create_connection`, but over IPv4 only. Tries the
 * addresses of `host` in turn until one accepts. `timeout`, in seconds, covers the lookup and all
 * attempts together. It then becomes the connection's timeout. By default there is no timeout.
 *
 * Rejects with a `SocketError` if `host` cannot be resolved, if no address accepts (the error is
 * from the last one), or if the timeout expires. Rejects with a `RangeError` or a `TypeError` for
 * an invalid argument.
 *
 * Bun cannot cancel an attempt. After a timeout, the process may stay alive until the kernel gives
 * up. If the attempt succeeds after all, the connection is closed.
 */
export async function connect(
  host: string,
  port: number,
  timeout: number = Infinity,
): Promise<Connection> {
  checkHost(host);
  checkTimeout(timeout);
  const blank = new SocketError(""); // before the first `await`: see `fillIn`
  const controller = new AbortController();
  const connecting = dial(host, port, timeout, controller.signal);
  // Wait for `connecting`, but for no longer than the timeout. (`notify` cannot come before the
  // wait, because `then` never calls it synchronously.)
  const settled = new Condition();
  const notify = () => settled.notify();
  // Handle a rejection as well: after the timeout, it would otherwise be reported as unhandled.
  connecting.then(notify, notify);
  try {
    const isInTime = await settled.wait(timeout);
    if (!isInTime) {
      controller.abort();
      const message = `cannot connect to (${repr(host)}, ${port}): timed out`;
      throw new SocketError("ETIMEDOUT", message);
    }
    return await connecting;
  } catch (error) {
    throw fillIn(blank, error);
  }
}

/**
 * Tries the addresses of `host` in turn until one accepts or `signal` is aborted. `timeout` becomes
 * the connection's timeout. It does not limit the attempts.
 */
async function dial(
  host: string,
  port: number,
  timeout: number,
  signal: AbortSignal,
): Promise<Connection> {
  const open = (socket: Socket<Connection>) => {
    socket.data = new Connection(socket, timeout); // where the handlers find it
  };
  const handlers = { ...Connection.handlers, open };
  const addresses = await lookUp(host);
  let failure: unknown;
  for (const address of addresses) {
    if (signal.aborted) break;
    try {
      // Without `allowHalfOpen`, Bun would end this side's stream when the peer ends its own.
      const options = { hostname: address, port, allowHalfOpen: true, socket: handlers };
      const socket = await Bun.connect(options);
      if (signal.aborted) socket.data.close();
      return socket.data; // `open` has set it.
    } catch (error) {
      failure = toError(`cannot connect to ${new Address(address, port)}`, error);
    }
  }
  throw failure; // If `signal` was aborted, `connect` has already rejected, and this is ignored.
}

/**
 * Listens on `host`, over IPv4 only. If `host` is a name, listens on its first address. If it is
 * "0.0.0.0" or empty, listens on all of this machine's IPv4 addresses.
 *
 * Calls `serve` for each client that connects, without waiting for the others, and closes the
 * connection when its `serve` is done. `timeout`, in seconds, becomes the timeout of each
 * connection. By default there is no timeout.
 *
 * If `serve` throws, the client's address and the reason go to standard error, and other clients
 * are unaffected. Anything but a `SocketError` or an `EOFError` is treated as a bug and printed
 * with its stack.
 *
 * Even if `serve` throws, the connection is closed with `close`, not with `abort`, because `serve`
 * may have sent a last message about the error. If `serve` throws between two calls of `sendAll`, a
 * client may therefore mistake a truncated reply for a complete one. If that matters, catch the
 * error in `serve`, call `abort` and throw the error again.
 *
 * Resolves to Bun's listener. If `port` is 0, the system picks a port, and the listener's `port`
 * says which. After `stop()`, the listener accepts no more clients. `stop(true)` also cuts off the
 * clients that are connected. Rejects with a `SocketError` if `host` cannot be resolved or its
 * address cannot be bound, and with a `RangeError` or a `TypeError` for an invalid argument.
 */
export async function listen(
  host: string,
  port: number,
  serve: (connection: Connection) => unknown,
  timeout: number = Infinity,
): Promise<TCPSocketListener<Connection>> {
  checkHost(host);
  checkTimeout(timeout);
  if (typeof serve !== "function") throw new TypeError(`serve must be a function, not ${serve}`);

  async function open(socket: Socket<Connection>): Promise<void> {
    using connection = new Connection(socket, timeout); // closed when `serve` is done
    socket.data = connection;
    try {
      await serve(connection);
    } catch (error) {
      if (error instanceof SocketError || error instanceof EOFError) {
        console.error(`${connection.peername}: ${error.message}`);
      } else {
        console.error(`${connection.peername}:`, error); // with its stack
      }
    }
  }

  const blank = new SocketError(""); // before the first `await`: see `fillIn`
  const handlers = { ...Connection.handlers, open };
  try {
    const [first] = await lookUp(host);
    return listenAt(first, port, handlers);
  } catch (error) {
    throw fillIn(blank, error);
  }
}

function listenAt(
  address: string,
  port: number,
  handlers: SocketHandler<Connection>,
): TCPSocketListener<Connection> {
  try {
    // Bun sets SO_REUSEADDR, which on Windows lets a second server take the port. `exclusive`
    // prevents that.
    return Bun.listen({
      hostname: address,
      port,
      exclusive: true,
      allowHalfOpen: true,
      socket: handlers,
    });
  } catch (error) {
    throw toError(`cannot listen at ${new Address(address, port)}`, error);
  }
}

/** Resolves to the IPv4 addresses of `host` (at least one). As in Python, '' means 0.0.0.0. */
async function lookUp(host: string): Promise<[string, ...string[]]> {
  if (host === "") return ["0.0.0.0"];
  if (isIPv4(host)) return [host];
  const summary = `cannot resolve ${repr(host)}`;
  let found: Bun.DNSLookup[];
  try {
    // As in Python, this asks the system's resolver. Bun's own resolver does not know `127.1`.
    found = await Bun.dns.lookup(host, { family: 4, backend: "system" });
  } catch (error) {
    throw toError(summary, error);
  }
  const [first, ...others] = found.map((entry) => entry.address);
  if (first === undefined) {
    const reason = REASONS["DNS_ENOTFOUND"];
    throw new SocketError("DNS_ENOTFOUND", `${summary}: ${reason}`);
  }
  return [first, ...others]; // The type says that there is at least one.
}

/**
 * Returns whether `host` is four decimal numbers from 0 to 255, which need no lookup. `node:net`
 * has an `isIPv4`, but loading that module takes longer than the whole exchange.
 */
function isIPv4(host: string): boolean {
  const parts = host.split(".");
  return parts.length === 4 && parts.every(isByte);
}

function isByte(text: string): boolean {
  const value = Number(text);
  // Only the usual spelling counts, because the resolver reads "010" as octal.
  const isDecimal = Number.isInteger(value) && String(value) === text;
  return isDecimal && value >= 0 && value <= 255;
}

/** Formats bytes, or a string's UTF-8 bytes, as printable ASCII, as Python 2's `repr` does. */
export function repr(bytes: string | Uint8Array): string {
  const text = Buffer.from(bytes).toString("latin1"); // one character for each byte
  const prefersDoubleQuotes = text.includes("'") && !text.includes('"');
  const quote = prefersDoubleQuotes ? '"' : "'";
  let shown = "";
  for (const char of text) {
    if (char === quote || char === "\\") shown += `\\${char}`;
    else if (char === "\t") shown += "\\t";
    else if (char === "\n") shown += "\\n";
    else if (char === "\r") shown += "\\r";
    else if (char >= " " && char <= "~") shown += char;
    else shown += `\\x${char.charCodeAt(0).toString(16).padStart(2, "0")}`;
  }
  return quote + shown + quote;
}

// `process.exit` does not wait for a connection that lingers. (The client has its reply by then.)
// With an `await` here, programs that import this file could not be built with `--format=cjs`.
if (import.meta.main) void main(process.argv.slice(2)).then(process.exit);
