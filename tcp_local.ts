#!/usr/bin/env bun
/**
 * For Bun: the TCP server and client of "Foundations of Python Network Programming" (second
 * edition, Python 2), which exchange messages of sixteen bytes.
 *
 *     bun tcp_local.ts server
 *     bun tcp_local.ts client 127.0.0.1
 *
 * TCP carries a stream of bytes and knows nothing of messages: what is sent in one piece may arrive
 * in many, and many pieces may arrive in one. In Python, a loop around the blocking `recv` puts a
 * message back together. Bun has no `recv`. It hands each piece to a `data` handler as it arrives.
 *
 * So below the program is the socket that its loop needs, a `Connection` with a `recv` to await.
 */
import type { Socket, SocketHandler, TCPSocketListener } from "bun";

/** The TCP port of the Python program. */
export const PORT = 1060;

/**
 * Receives exactly `length` bytes and resolves to them in a new buffer. `sock` is anything with a
 * `recv` that resolves to 1 to `maxLength` bytes, or to an empty array at the end of the stream.
 *
 * It never asks `recv` for more bytes than are missing, so what follows the message is left for
 * the next `recv`. A `length` of 0 reads nothing. A timeout of `sock` limits each `recv`, not the
 * whole message.
 *
 * Rejects with an `EOFError` if the stream ends first, and with the error of `recv` if that
 * rejects. After an error of `recv`, even a timeout, the part of the message that was received
 * before is lost, so close the connection.
 *
 * Rejects with a `RangeError`, and reads nothing, if `length` is not 0 or a positive integer.
 */
export async function recvAll(
  sock: { recv(maxLength: number): Promise<Uint8Array> },
  length: number,
): Promise<Buffer> {
  if (!Number.isInteger(length) || length < 0) {
    throw new RangeError(`recvAll takes 0 or a positive integer, not ${length}`);
  }
  const data = Buffer.alloc(length);
  let received = 0;
  while (received < length) {
    const more = await sock.recv(length - received);
    // In JavaScript, `recv` could resolve to a string, which `data.set` would not refuse.
    if (!(more instanceof Uint8Array)) throw new TypeError("recv must resolve to bytes");
    if (more.length === 0) throw new EOFError(data.subarray(0, received), length);
    data.set(more, received);
    received += more.length;
  }
  return data;
}

/**
 * The stream ended before the message did: of the `expected` bytes, only `partial` arrived. It is
 * empty if none arrived.
 */
export class EOFError extends Error {
  override readonly name = "EOFError";
  readonly partial: Buffer;
  readonly expected: number;

  constructor(partial: Buffer, expected: number) {
    super(`socket closed ${partial.length} bytes into a ${expected}-byte message`);
    this.partial = partial;
    this.expected = expected;
  }
}

/**
 * Answers every client that connects to `host`, and prints what the Python program prints. The
 * variables are named as in that program. A client that is silent for `timeout` seconds is
 * disconnected. Resolves to Bun's listener.
 */
export async function server(
  host: string,
  port: number = PORT,
  timeout: number = 60,
): Promise<TCPSocketListener<Connection>> {
  const listener = await listen(host, port, serve, timeout); // calls `serve` when a client connects
  const address = new Address(listener.hostname, listener.port);
  console.log(`Listening at ${address}`);

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

/** Exchanges one message with the server at `host`, and prints what the Python program prints. */
export async function client(
  host: string,
  port: number = PORT,
  timeout: number = 60,
): Promise<void> {
  using s = await connect(host, port, timeout); // Like Python's `with`: closed at the end.
  console.log(`Client has been assigned socket name ${s.sockname}`);
  await s.sendAll("Hi there, server");
  const reply = await recvAll(s, 16);
  console.log(`The server said ${repr(reply)}`);
}

/** Runs the mode that the command line gives, and resolves to the exit status. */
export async function main(args: string[]): Promise<number> {
  const mode = args[0];
  const host = args[1] ?? "127.0.0.1";
  try {
    if (mode === "server" && args.length <= 2) {
      await server(host);
      await new Promise(() => {}); // A server runs until a signal.
    } else if (mode === "client" && args.length <= 2) {
      await client(host);
    } else {
      console.error("usage: tcp_local.ts server|client [host]");
      return 2;
    }
    return 0;
  } catch (error) {
    const { message } = error as Error;
    console.error(`tcp_local.ts: ${message}`);
    return 1;
  }
}

// ---- The socket with a `recv`, which Python has built in and Bun lacks ------------------------

/** Error codes in words. Those with `DNS_` are names of Bun, the others of the system. */
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

/** A socket call failed. `code` says why, such as `ECONNRESET`. It is empty if Bun gives none. */
export class SocketError extends Error {
  override readonly name = "SocketError";
  readonly code: string;

  constructor(code: string, message: string = REASONS[code] ?? code, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}

/**
 * Returns the error to throw because of `cause`: a `SocketError` that says what could not be done,
 * and why, or `cause` itself if it complains of a wrong argument, a mistake of our caller.
 */
function failureOf(summary: string, cause: unknown): unknown {
  if (cause instanceof TypeError || cause instanceof RangeError) return cause;
  const error = cause as NodeJS.ErrnoException;
  const code = error.code ?? "";
  const reason = REASONS[code] ?? error.message;
  return new SocketError(code, `${summary}: ${reason}`, { cause });
}

/**
 * Gives `blank` the code and the words of `error`, and returns `blank`. (An error of another class
 * is returned as it is.)
 *
 * The stack of an error that is made after an `await` lacks the line that called `connect` or
 * `listen`, if that is at the top level of a module. So they make a blank error first, and fill it
 * in if they fail.
 */
function fillIn(blank: SocketError, error: unknown): unknown {
  if (!(error instanceof SocketError)) return error;
  return Object.assign(blank, { code: error.code, message: error.message, cause: error.cause });
}

/** The address of one end of a connection. In a template, it is the tuple that Python prints. */
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

/** In seconds, the longest time that `setTimeout` can count. A longer one is treated as none. */
const LONGEST_TIMEOUT = 2_147_483;

function checkTimeout(timeout: number): void {
  const isPositive = typeof timeout === "number" && timeout > 0; // false for NaN, too
  if (!isPositive) {
    throw new RangeError(`a timeout is a number of seconds above 0, not ${timeout}`);
  }
}

/**
 * Where a call waits until a handler says that something has changed: Python's
 * `threading.Condition` without the lock, for one waiter.
 *
 * A notify does nothing while nobody waits. So look at the state before waiting, and again after.
 */
class Condition {
  #resolve: ((isNotified: boolean) => void) | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  get isAwaited(): boolean {
    return this.#resolve !== undefined;
  }

  /** Resolves to true when `notify` is called, or to false after `timeout` seconds. */
  wait(timeout: number): Promise<boolean> {
    const { promise, resolve } = Promise.withResolvers<boolean>();
    this.#resolve = resolve;
    if (timeout <= LONGEST_TIMEOUT) {
      this.#timer = setTimeout(() => this.#onTimer(), timeout * 1000);
    }
    return promise;
  }

  notify(): void {
    this.#endWait(true);
  }

  #onTimer(): void {
    // If the process was busy, what arrived in time may not have been read yet. A timer of 0 fires
    // after Bun has looked at its sockets once more. Until then, `notify` may still end the wait.
    this.#timer = setTimeout(() => this.#endWait(false), 0);
  }

  #endWait(isNotified: boolean): void {
    clearTimeout(this.#timer);
    this.#resolve?.(isNotified);
    this.#resolve = undefined;
  }
}

/**
 * A `recv` whose bytes are there, or a `sendAll` that finds room, does not wait. A loop of such
 * calls would leave no turn to other sockets. So every 64th call lets the event loop go round.
 */
const CALLS_PER_TURN = 64;
let calls = 0; // of all connections together

function eventLoopTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

const LINGER_TIME = 4; // in seconds: see `close`

/**
 * A TCP connection with the methods of a blocking socket. Await `recv` and `sendAll`, which block
 * in Python. As with any promise, a rejection that nobody handles ends the process.
 *
 * They reject with a `SocketError`, whose `code` says why:
 *
 * - `ETIMEDOUT`: The call made no progress for `timeout` seconds, or the peer has vanished.
 * - `EHOSTUNREACH`: The peer has vanished, as the network tells.
 * - `ECONNRESET`: The peer has reset the connection, or `sendAll` has found it broken.
 * - `EPIPE`: As `ECONNRESET`, but after the peer had ended its stream. Or this process has called
 *   `shutdown`, and then `sendAll`.
 * - `ECONNABORTED`: This process has called `stop(true)` of Bun's listener. (If it had called
 *   `shutdown` before, `recv` takes that for the end of the stream.)
 * - `EBADF`: This process has called `close`.
 *
 * An open connection keeps the process alive, so declare it with `using`, which closes it.
 */
export class Connection {
  readonly sockname: Address;
  readonly peername: Address;
  /**
   * In seconds: how long a `recv` waits for bytes, and a `sendAll` for room for the next byte,
   * before it rejects with `ETIMEDOUT`. `Infinity` is no timeout, like Python's `None`.
   *
   * It may be changed for later calls. If it is not a number above 0, they reject with a
   * `RangeError`.
   */
  timeout: number;

  readonly #socket: Socket<Connection>;
  /** The bytes that have arrived, and that `recv` has not returned yet. */
  #unread: Buffer = Buffer.alloc(0);
  /** Whether a `recv` is pending. */
  #isReceiving = false;
  /** The `sendAll` that waits for room, if there is one. */
  #sending: Promise<void> | undefined;
  /** Whether `shutdown` or `close` was called: this side sends no more. */
  #hasShutDown = false;
  /** Whether `close` was called. */
  #hasClosed = false;
  /** Whether the end of the stream has arrived. */
  #peerHasEnded = false;
  /** The code of the first error. It is empty while there is none. */
  #failure = "";
  /** Whether Bun has closed the socket. If so, the peer has ended, or there is a failure. */
  #isDisconnected = false;
  /** Notified when `recv` may go on: with bytes, at the end, or with an error. */
  readonly #arrival = new Condition();
  /** Notified when `sendAll` may go on: the kernel has room for bytes, or there is an error. */
  readonly #room = new Condition();
  #lingerTimer: ReturnType<typeof setTimeout> | undefined;

  /** Called by Bun. They find the connection in `socket.data`, which Bun leaves to programs. */
  static readonly handlers: SocketHandler<Connection> = {
    data: (socket, bytes) => socket.data.#onData(bytes),
    end: (socket) => socket.data.#onEnd(),
    close: (socket, error) => socket.data.#onClose(error),
    drain: (socket) => socket.data.#room.notify(),
  };

  /** `socket` is open, and has these handlers. The caller sets its `data` to the connection. */
  constructor(socket: Socket<Connection>, timeout: number) {
    this.#socket = socket;
    this.timeout = timeout;
    // If the peer has reset the connection already, Bun has no addresses.
    this.sockname = new Address(socket.localAddress ?? "0.0.0.0", socket.localPort ?? 0);
    this.peername = new Address(socket.remoteAddress ?? "0.0.0.0", socket.remotePort ?? 0);
    socket.setKeepAlive(true, 60_000); // in milliseconds: so that a vanished peer is noticed
  }

  #onData(bytes: Buffer): void {
    if (this.#hasClosed) return;
    const hasUnread = this.#unread.length > 0;
    this.#unread = hasUnread ? Buffer.concat([this.#unread, bytes]) : bytes;
    // If no `recv` waits, Bun is to read no more until one resumes the socket. What the peer sends
    // meanwhile fills the kernel's buffer, and then the peer has to wait.
    if (!this.#arrival.isAwaited) this.#socket.pause();
    this.#arrival.notify();
  }

  #onEnd(): void {
    // Bun also calls this after a write has failed. Then it is not the end of the stream, and
    // `#onClose` follows.
    if (!this.#failure) this.#peerHasEnded = true;
    this.#arrival.notify();
  }

  #onClose(error?: NodeJS.ErrnoException): void {
    clearTimeout(this.#lingerTimer);
    this.#isDisconnected = true;
    // After a failed write, `#failure` is set already. Then none of these three changes anything.
    if (error?.code) {
      this.#fail(error.code);
    } else if (this.#hasShutDown) {
      this.#onEnd(); // which Bun does not call after a shutdown
    } else {
      // Bun closes no socket by itself before both sides have ended. So this process has closed it,
      // with `stop(true)` of the listener.
      this.#fail("ECONNABORTED");
    }
    this.#arrival.notify();
    this.#room.notify();
  }

  #fail(code: string): void {
    // Only the first error says what has happened.
    if (!this.#failure) this.#failure = code;
  }

  /**
   * Resolves to at least 1 and at most `maxLength` bytes in a new buffer, as soon as there are any,
   * or to an empty buffer at the end of the stream.
   *
   * If the connection breaks, the bytes that arrived before can still be received. After that,
   * `recv` rejects. A `recv` that times out loses nothing, and may be called again.
   *
   * If another `recv` or `recvAll` is pending, rejects with an `Error`, and does not disturb that.
   * Rejects with a `RangeError` if `maxLength` is not a positive integer.
   */
  async recv(maxLength: number): Promise<Buffer> {
    if (!Number.isInteger(maxLength) || maxLength < 1) {
      throw new RangeError(`recv takes a positive integer, not ${maxLength}`);
    }
    const timeout = this.timeout;
    checkTimeout(timeout);
    if (this.#isReceiving) throw new Error("recv called while another recv is pending");
    this.#isReceiving = true;
    try {
      while (this.#unread.length === 0) {
        if (this.#hasClosed) throw new SocketError("EBADF");
        if (this.#peerHasEnded) break;
        // A failure alone is no reason to give up: after a failed `sendAll`, Bun may still have
        // bytes to read that arrived before.
        if (this.#isDisconnected) throw new SocketError(this.#failure);
        // Bun calls the handlers only when its event loop turns, so the wait misses no notify.
        this.#socket.resume();
        const isInTime = await this.#arrival.wait(timeout);
        if (!isInTime) throw new SocketError("ETIMEDOUT");
      }
      const bytes = this.#take(maxLength);
      calls += 1;
      if (calls % CALLS_PER_TURN === 0) await eventLoopTurn();
      return bytes;
    } finally {
      // Our caller goes on in a later microtask. Until then, no other `recv` may slip in and take
      // the rest of its message. So the flag is cleared in the microtask directly before that.
      queueMicrotask(() => {
        this.#isReceiving = false;
      });
    }
  }

  #take(maxLength: number): Buffer {
    const bytes = this.#unread;
    if (bytes.length > maxLength) {
      this.#unread = bytes.subarray(maxLength);
      return Buffer.from(bytes.subarray(0, maxLength)); // a copy
    }
    this.#unread = Buffer.alloc(0);
    // The last part of a larger piece is copied, too. It would keep all of the piece's memory.
    const isWholePiece = bytes.length === bytes.buffer.byteLength;
    return isWholePiece ? bytes : Buffer.from(bytes);
  }

  /**
   * Sends all of `data`, a string as UTF-8. Resolves when the kernel has every byte of it, which
   * does not mean that the peer has. Do not change a buffer before that.
   *
   * Calls send one after the other, in the order in which they were made. If one fails while it
   * sends, those that wait for it reject, too. A part of its data may have been sent, so the stream
   * may be out of step: close the connection. The wait for other calls does not count for the
   * timeout.
   *
   * Rejects with a `TypeError` if `data` is neither a string nor bytes.
   */
  async sendAll(data: string | NodeJS.ArrayBufferView | ArrayBufferLike): Promise<void> {
    const timeout = this.timeout;
    checkTimeout(timeout);
    const bytes = bytesOf(data);
    // If a buffer is transferred to a worker while this call waits, its length becomes 0, as if
    // all were sent. With the length from before, `write` throws an error instead.
    const length = bytes.length;
    try {
      // Calls that wait for the same `#sending` wake in their order. The first one sends. If it has
      // to wait for room, the others wait for it.
      while (this.#sending) await this.#sending;
      const sent = this.#write(bytes, 0, length);
      if (sent < length) {
        this.#sending = this.#sendRest(bytes, sent, length, timeout);
        try {
          await this.#sending;
        } finally {
          this.#sending = undefined; // before the calls that wait for it wake
        }
      }
    } catch (error) {
      // Calls that wait for one that fails are given its error. Each throws a new error, whose
      // stack leads to its caller.
      if (error instanceof SocketError) throw new SocketError(error.code);
      throw error;
    }
    calls += 1;
    if (calls % CALLS_PER_TURN === 0) await eventLoopTurn();
  }

  async #sendRest(
    bytes: Uint8Array,
    start: number,
    length: number,
    timeout: number,
  ): Promise<void> {
    let sent = start;
    while (sent < length) {
      const isInTime = await this.#room.wait(timeout);
      // Bun tells of room only when there is a lot of it. If the peer reads slowly, there may be a
      // little. So when the time is up, this tries once more. If a byte goes, it waits again.
      const more = this.#write(bytes, sent, length - sent);
      if (more === 0 && !isInTime) throw new SocketError("ETIMEDOUT");
      sent += more;
    }
  }

  /** Hands the kernel `count` bytes from `start` on. Returns how many of them it had room for. */
  #write(bytes: Uint8Array, start: number, count: number): number {
    if (this.#hasClosed) throw new SocketError("EBADF");
    if (this.#hasShutDown) throw new SocketError("EPIPE");
    const taken = this.#socket.write(bytes, start, count);
    if (taken < 0) {
      // The connection is broken: reset, if Bun has not told another reason. The kernel has two
      // codes for that: one if the peer had ended before, one if it had not.
      this.#fail(this.#peerHasEnded ? "EPIPE" : "ECONNRESET");
      throw new SocketError(this.#failure);
    }
    return taken;
  }

  /**
   * Ends the sending direction, like Python's `shutdown(SHUT_WR)`. The peer receives all that was
   * sent, and then the end of the stream. This side can still receive. A `sendAll` that is pending,
   * or called later, rejects with `EPIPE`. A second `shutdown`, or one after `close`, changes
   * nothing.
   */
  shutdown(): void {
    this.#hasShutDown = true;
    this.#socket.shutdown();
    this.#room.notify(); // so that a pending `sendAll` rejects
  }

  /**
   * Closes the connection. The peer receives all that was sent. Bytes not yet received are lost,
   * and pending calls reject with `EBADF`. A second `close` does nothing.
   *
   * If a socket is closed while its peer still sends, the kernel resets the connection, and what
   * is on its way to the peer is lost. So this ends the sending direction, and discards what
   * arrives until the peer closes too, for 4 seconds at most. The process stays alive until then.
   */
  close(): void {
    if (this.#hasClosed) return;
    this.#hasClosed = true;
    this.#unread = Buffer.alloc(0);
    this.shutdown();
    this.#arrival.notify(); // so that a pending `recv` rejects
    if (this.#peerHasEnded || this.#failure) {
      // Nothing more can arrive. Bun's method to close a socket for good is `end`.
      this.#socket.end();
    } else {
      this.#socket.resume();
      this.#lingerTimer = setTimeout(() => this.#socket.end(), LINGER_TIME * 1000);
    }
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

function bytesOf(data: string | NodeJS.ArrayBufferView | ArrayBufferLike): Uint8Array {
  if (typeof data === "string") return Buffer.from(data);
  if (data instanceof ArrayBuffer || data instanceof SharedArrayBuffer) return new Uint8Array(data);
  if (!ArrayBuffer.isView(data)) throw new TypeError("sendAll takes a string or bytes");
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

/**
 * Connects to a TCP server, like Python's `socket.create_connection`, but over IPv4 only. The
 * `timeout`, in seconds, limits the attempt, and then it is the connection's. By default there is
 * none.
 *
 * Rejects with a `SocketError` if `host` cannot be resolved, if none of its addresses accepts, or
 * if the time is up. Bun cannot stop an attempt: the process may live on until the kernel gives up.
 * If it still succeeds, the connection is closed. An argument that is not valid is a `RangeError`
 * or a `TypeError`.
 */
export async function connect(
  host: string,
  port: number,
  timeout: number = Infinity,
): Promise<Connection> {
  checkTimeout(timeout);
  const blank = new SocketError(""); // before the first `await`: see `fillIn`
  const attempt = { isTooLate: false };
  const dialling = dial(host, port, timeout, attempt);
  const done = new Condition();
  const notify = () => done.notify();
  dialling.then(notify, notify); // The second also handles a failure that comes too late.
  const isInTime = await done.wait(timeout);
  if (!isInTime) {
    attempt.isTooLate = true;
    const cause = new SocketError("ETIMEDOUT");
    throw fillIn(blank, failureOf(`cannot connect to (${repr(host)}, ${port})`, cause));
  }
  try {
    return await dialling;
  } catch (error) {
    throw fillIn(blank, error);
  }
}

/** Tries the addresses of `host` in turn, until one accepts or it is too late. */
async function dial(
  host: string,
  port: number,
  timeout: number,
  attempt: { isTooLate: boolean },
): Promise<Connection> {
  const open = (socket: Socket<Connection>) => {
    socket.data = new Connection(socket, timeout); // where the handlers find it
  };
  const handlers = { ...Connection.handlers, open };
  const addresses = isIPv4(host) ? [host] : await lookUp(host);
  let failure: unknown;
  for (const hostname of addresses) {
    if (attempt.isTooLate) break;
    try {
      // Without `allowHalfOpen`, Bun would end this side, too, as soon as the peer ends its own.
      const socket = await Bun.connect({ hostname, port, allowHalfOpen: true, socket: handlers });
      if (attempt.isTooLate) socket.data.close();
      return socket.data;
    } catch (error) {
      failure = failureOf(`cannot connect to ${new Address(hostname, port)}`, error);
    }
  }
  throw failure; // If it is too late, nobody sees this.
}

/**
 * Listens at `host`, over IPv4 only, and calls `serve` for each client that connects, without
 * waiting for the others. Each connection has the `timeout`, in seconds (by default none), and is
 * closed when its `serve` is done.
 *
 * If `serve` rejects, standard error gets the client's address and the message. Anything but a
 * `SocketError` or an `EOFError` is a bug: then it gets the stack, too.
 *
 * Resolves to Bun's listener. Port 0 picks a free port. Rejects with a `SocketError` if it cannot
 * listen there, and for a wrong argument as `connect` does.
 */
export async function listen(
  host: string,
  port: number,
  serve: (connection: Connection) => void | Promise<void>,
  timeout: number = Infinity,
): Promise<TCPSocketListener<Connection>> {
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

  checkTimeout(timeout);
  const blank = new SocketError(""); // before the first `await`: see `fillIn`
  const handlers = { ...Connection.handlers, open };
  try {
    const hostname = isIPv4(host) ? host : (await lookUp(host))[0];
    return bind(hostname, port, handlers);
  } catch (error) {
    throw fillIn(blank, error);
  }
}

function bind(
  hostname: string,
  port: number,
  socket: SocketHandler<Connection>,
): TCPSocketListener<Connection> {
  try {
    // Bun sets SO_REUSEADDR, which on Windows lets a second server take the port. `exclusive`
    // prevents that.
    return Bun.listen({ hostname, port, exclusive: true, allowHalfOpen: true, socket });
  } catch (error) {
    throw failureOf(`cannot listen at ${new Address(hostname, port)}`, error);
  }
}

/** Resolves to the IPv4 addresses of `host`, at least one. As in Python, '' is 0.0.0.0. */
async function lookUp(host: string): Promise<[string, ...string[]]> {
  if (host === "") return ["0.0.0.0"];
  const summary = `cannot resolve ${repr(host)}`;
  let found: Bun.DNSLookup[];
  try {
    // As in Python, the system looks it up. Bun by itself does not know `127.1`.
    found = await Bun.dns.lookup(host, { family: 4, backend: "system" });
  } catch (error) {
    throw failureOf(summary, error);
  }
  const addresses = found.map((entry) => entry.address);
  const first = addresses[0];
  if (first === undefined) throw failureOf(summary, new SocketError("DNS_ENOTFOUND"));
  return [first, ...addresses.slice(1)]; // so that the type says: at least one
}

/**
 * Whether `host` is four decimal numbers from 0 to 255, which needs no look-up. (`node:net` has an
 * `isIPv4`, but takes 6 ms to load.)
 */
function isIPv4(host: string): boolean {
  const parts = host.split(".");
  return parts.length === 4 && parts.every(isByte);
}

function isByte(text: string): boolean {
  const value = Number(text);
  const isDecimal = Number.isInteger(value) && String(value) === text; // "010" would be octal
  return isDecimal && value >= 0 && value <= 255;
}

/** Shows bytes as Python 2's `repr` does: in printable ASCII. */
export function repr(bytes: string | Uint8Array): string {
  const text = Buffer.from(bytes).toString("latin1"); // one character for each byte
  const hasSingleQuotesOnly = text.includes("'") && !text.includes('"');
  const quote = hasSingleQuotesOnly ? '"' : "'";
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

// When `main` is done, so is the exchange. This does not wait for a connection that lingers.
if (import.meta.main) process.exit(await main(process.argv.slice(2)));
