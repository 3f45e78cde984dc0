#!/usr/bin/env bun
/**
 * The classic sixteen-byte TCP server and client, for Bun.
 *
 *     bun tcp_local.ts server
 *     bun tcp_local.ts client 127.0.0.1
 *
 * TCP carries a stream of bytes and knows nothing of messages: what is sent in one piece may arrive
 * in many, and many pieces may arrive in one. In Python, a loop around the blocking `recv` puts a
 * message back together. Bun has no `recv`. It hands each piece to a `data` handler as it arrives.
 *
 * So this file has two parts: the program, with the loop from Python, and then the socket that such
 * a loop needs, a `Connection` with a `recv` that can be awaited.
 */
import { getSystemErrorMap } from "node:util";
import type { Socket, SocketHandler, TCPSocketListener } from "bun";

/** The port of the original. */
export const PORT = 1060;

/**
 * The stream ended before the message did: of `expected` bytes, only `partial` came, which is empty
 * if the stream ended between two messages.
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
 * Receives exactly `length` bytes, into a buffer that is the caller's own.
 *
 * It never asks `recv` for more bytes than are missing, so what follows the message stays in the
 * socket. A `length` of 0 gives an empty buffer and reads nothing.
 *
 * If the stream ends first, it rejects with an `EOFError`. If `recv` rejects, it rejects with the
 * same error. Either way, the bytes that had come are gone from the socket; an `EOFError` has
 * them as `partial`. If `length` is negative or fractional, it rejects with a `RangeError` and
 * reads nothing.
 */
export async function recvAll(
  sock: { recv(maxLength: number): Promise<Uint8Array> },
  length: number,
): Promise<Buffer> {
  if (!Number.isInteger(length) || length < 0) {
    throw new RangeError(`recvAll takes 0 bytes or more, not ${length}`);
  }
  const data = Buffer.alloc(length);
  let received = 0;
  while (received < length) {
    const more = await sock.recv(length - received);
    if (!(more instanceof Uint8Array)) throw new TypeError("recv gave something other than bytes");
    if (more.length === 0) throw new EOFError(data.subarray(0, received), length);
    data.set(more, received);
    received += more.length;
  }
  return data;
}

/** Serves every client of `host`, as `listen` does, and prints what the original prints. */
export async function server(
  host: string,
  port: number = PORT,
  timeout?: number,
): Promise<TCPSocketListener<Connection>> {
  const listener = await listen(host, port, serve, timeout);
  const listening = `Listening at ${address(listener.hostname, listener.port)}`;
  console.log(listening);
  return listener;

  async function serve(sc: Connection): Promise<void> {
    console.log(
      `We have accepted a connection from ${sc.peername}\n` +
        `Socket connects ${sc.sockname} and ${sc.peername}`,
    );
    const message = await recvAll(sc, 16);
    console.log(`The incoming sixteen-octet message says ${repr(message)}`);
    await sc.sendAll("Farewell, client");
    sc.close();
    console.log(`Reply sent, socket closed\n${listening}`);
  }
}

/** Has one exchange with the server at `host`, and prints what the original prints. */
export async function client(host: string, port: number = PORT, timeout?: number): Promise<void> {
  using s = await connect(host, port, timeout);
  console.log(`Client has been assigned socket name ${s.sockname}`);
  await s.sendAll("Hi there, server");
  const reply = await recvAll(s, 16);
  console.log(`The server said ${repr(reply)}`);
}

/** Does what the command line says. Resolves to the exit status; a server runs until a signal. */
export async function main(args: string[]): Promise<number> {
  const [mode, host = "127.0.0.1"] = args.length > 2 ? [] : args;
  try {
    if (mode === "server") await server(host).then(() => new Promise(() => {}));
    else if (mode === "client") await client(host);
    else {
      console.error("usage: tcp_local.ts server|client [host]");
      return 2;
    }
    return 0;
  } catch (error) {
    console.error(`tcp_local.ts: ${inOneLine(error)}`);
    return 1;
  }
}

// ---- What Python has built in: the socket, and some smaller things --------------------------

const NOTHING: Buffer = Buffer.alloc(0);

/**
 * A TCP connection with the calls of a blocking socket: await them where Python blocks.
 *
 * A call that waits `timeout` seconds and moves no byte ends with `timed out` (`ETIMEDOUT`). If the
 * connection breaks, a call ends with the error of the socket, such as `ECONNRESET`. If this
 * process cuts the connection off, as `listener.stop(true)` does, the error is `ECONNABORTED`.
 *
 * A connection keeps the process alive until it is closed, so declare it with `using`.
 */
export class Connection {
  /** One set of handlers for all sockets. Each socket has its connection as `data`. */
  static readonly handlers: SocketHandler<Connection> = {
    data: (socket, bytes) => socket.data.received(bytes),
    drain: (socket) => socket.data.wakeWriter?.(),
    end: (socket) => socket.data.ended(),
    close: (socket, error) => socket.data.closed(error),
  };

  readonly sockname: Address;
  readonly peername: Address;
  private readonly socket: Socket<Connection>;
  private readonly timeout: number;
  private unread = NOTHING;
  private recvEnd: string | undefined; // why nothing more can be received: "EOF" or an error code
  private sendEnd: string | undefined; // why nothing more can be sent: an error code
  private receiving = false;
  private paused = false;
  private sending: Promise<boolean> | undefined;
  private stalled = false; // a wait to send has timed out, and no byte has moved since
  private wakeReader: (() => void) | undefined;
  private wakeWriter: (() => void) | undefined;

  /** Takes over a socket that is open. Its handlers must be the ones above. */
  constructor(socket: Socket<Connection>, timeout: number) {
    this.socket = socket;
    this.timeout = timeout;
    this.sockname = address(socket.localAddress, socket.localPort);
    this.peername = address(socket.remoteAddress, socket.remotePort);
  }

  /**
   * Resolves to 1 to `maxLength` bytes as soon as there are any, and to none at the end of the
   * stream. The buffer is the caller's own.
   *
   * If the connection breaks, it gives the bytes that came before, and only then rejects. If
   * another `recv` or `recvAll` is under way, it rejects with an `Error`, and the other goes on.
   * If `maxLength` is not a whole number from 1, it rejects with a `RangeError`.
   */
  async recv(maxLength: number): Promise<Buffer> {
    if (!Number.isInteger(maxLength) || maxLength < 1) {
      throw new RangeError(`recv takes 1 byte or more, not ${maxLength}`);
    }
    if (this.recvEnd === "EBADF") throw socketError("EBADF");
    if (this.receiving) throw new Error("recv called while another recv is pending");
    this.receiving = true;
    try {
      while (this.unread.length === 0) {
        if (this.recvEnd === "EOF") return Buffer.alloc(0);
        if (this.recvEnd) throw socketError(this.recvEnd);
        this.socket.resume();
        this.paused = false;
        const inTime = await waitFor(this.timeout, (wake) => (this.wakeReader = wake));
        if (!inTime) throw socketError("ETIMEDOUT");
      }
      const bytes = this.unread;
      // A piece that is wanted whole is given away. A part of one is copied, so that it shares no
      // memory with the rest, and does not keep all of the piece alive.
      const whole = bytes.length <= maxLength && bytes.length === bytes.buffer.byteLength;
      this.unread = bytes.length > maxLength ? bytes.subarray(maxLength) : NOTHING;
      return whole ? bytes : Buffer.copyBytesFrom(bytes, 0, maxLength);
    } finally {
      // This runs right before the caller goes on. Until then nobody else may read: the caller may
      // have half of its message, and be about to ask for the rest.
      queueMicrotask(() => (this.receiving = false));
    }
  }

  /**
   * Resolves when every byte of `data` is handed to the kernel. A string is sent as UTF-8.
   *
   * Calls take turns, and time out together. After one rejects, nobody knows how much was sent.
   */
  async sendAll(data: string | NodeJS.ArrayBufferView): Promise<void> {
    this.stalled = false; // What an earlier call met does not count.
    while (this.sending) await this.sending;
    for (let unsent = data; ;) {
      if (this.sendEnd) throw socketError(this.sendEnd);
      const sent = this.socket.write(unsent);
      if (sent > 0) this.stalled = false;
      if (sent === Buffer.byteLength(unsent)) return;
      if (sent < 0) throw socketError((this.sendEnd = "ECONNRESET"));
      // `drain` comes only when there is a lot of room, so one more write is tried when time is up.
      if (this.stalled) throw socketError("ETIMEDOUT");
      const view = typeof unsent === "string" ? Buffer.from(unsent) : unsent;
      unsent = new Uint8Array(view.buffer, view.byteOffset + sent, view.byteLength - sent);
      this.sending = waitFor(this.timeout, (wake) => (this.wakeWriter = wake));
      this.stalled = !(await this.sending);
      this.sending = undefined;
    }
  }

  /**
   * Closes the connection. What was sent still goes out, what was not read is lost, and whatever
   * waits rejects with `EBADF`. A second `close` does nothing.
   *
   * Closing a socket with bytes unread would reset the connection, and the peer could lose what
   * was sent. So then this discards what comes until the peer closes too, for 4 seconds at most.
   */
  close(): void {
    if (this.sendEnd === "EBADF") return;
    this.recvEnd = this.sendEnd = "EBADF";
    this.socket.shutdown();
    const linger = this.unread.length > 0 || this.paused;
    this.unread = NOTHING;
    this.socket.resume();
    if (linger) setTimeout(() => this.socket.end(), 4000).unref();
    else this.socket.end();
    this.closed(); // which wakes whoever waits
  }

  [Symbol.dispose](): void {
    this.close();
  }

  private received(bytes: Buffer): void {
    if (this.recvEnd) return;
    const behind = this.unread.length > 0;
    this.unread = behind ? Buffer.concat([this.unread, bytes]) : bytes;
    // When nobody reads, let what follows wait in the kernel, which makes the sender wait.
    if (behind) this.socket.pause();
    this.paused ||= behind;
    this.wakeReader?.();
  }

  private ended(): void {
    // After a write has met a reset, this is not the end of the stream: it is the reset.
    this.recvEnd ??= this.sendEnd ?? "EOF";
    this.wakeReader?.();
  }

  private closed(error?: NodeJS.ErrnoException): void {
    this.sendEnd ??= error?.code ?? "ECONNABORTED";
    this.ended();
    this.wakeWriter?.();
  }
}

/** Hands `start` a callback. Resolves to true once that is called, to false after `timeout` s. */
function waitFor(timeout: number, start: (wake: () => void) => void): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const milliseconds = Math.min(timeout * 1000, 2 ** 31 - 1);
  // Between two timers Bun looks at its sockets: what came while the process was busy is in time.
  const timer = setTimeout(() => setTimeout(resolve, 0, false), milliseconds);
  start(() => {
    clearTimeout(timer);
    resolve(true);
  });
  return promise;
}

/**
 * Connects to a TCP server, as Python's `socket.create_connection` does, but over IPv4 only.
 *
 * Rejects if `host` cannot be resolved, or if there is no connection within `timeout` seconds, the
 * look-up included. Bun cannot stop an attempt: the process may live on until the kernel gives up.
 */
export async function connect(
  host: string,
  port: number = PORT,
  timeout = 60,
): Promise<Connection> {
  const connecting = dial(host, port, timeout);
  if (await waitFor(timeout, (wake) => connecting.then(wake, wake))) return connecting;
  connecting.then((connection) => connection.close()).catch(() => {});
  throw socketError("ETIMEDOUT", `cannot connect to (${repr(host)}, ${port}): `);
}

async function dial(host: string, port: number, timeout: number): Promise<Connection> {
  const hostname = await gethostbyname(host);
  try {
    const open = (s: Socket<Connection>) => void (s.data = new Connection(s, timeout));
    const socket = { ...Connection.handlers, open };
    const { data } = await Bun.connect({ hostname, port, allowHalfOpen: true, socket });
    if (data.peername.port === undefined) throw socketError("ECONNRESET");
    return data;
  } catch (error) {
    throw explain(error, `cannot connect to ${address(hostname, port)}`);
  }
}

/**
 * Listens at `host`, and calls `serve` for every client that comes, side by side. A connection is
 * closed when its `serve` is done. If that fails, a line on standard error says for whom and why.
 *
 * Resolves to Bun's listener once bound; port 0 picks a free port. Rejects if it cannot be bound.
 */
export async function listen(
  host: string,
  port: number,
  serve: (connection: Connection) => void | Promise<void>,
  timeout = 60,
): Promise<TCPSocketListener<Connection>> {
  const hostname = await gethostbyname(host);
  try {
    const socket = { ...Connection.handlers, open };
    // Without `exclusive`, a second server on Windows could take the port.
    return Bun.listen({ hostname, port, exclusive: true, allowHalfOpen: true, socket });
  } catch (error) {
    throw explain(error, `cannot listen at ${address(hostname, port)}`);
  }

  async function open(socket: Socket<Connection>): Promise<void> {
    using sc = (socket.data = new Connection(socket, timeout));
    // After a reset the peer has no address, whatever the types say.
    if (sc.peername.port === undefined) return console.error("a client: connection reset by peer");
    try {
      await serve(sc);
    } catch (error) {
      console.error(`${sc.peername}: ${inOneLine(error)}`);
    }
  }
}

/** The address of one end. In a template, it is the tuple that Python prints. */
type Address = { readonly host: string; readonly port: number };
function address(host: string, port: number): Address {
  return Object.assign({ host, port }, { toString: () => `('${host}', ${port})` });
}

/** Resolves to an IPv4 address, which may be `host` itself. As in Python, '' is every interface. */
async function gethostbyname(host: string): Promise<string> {
  if (host === "") return "0.0.0.0";
  const parts = host.split(".");
  if (parts.length === 4 && parts.every((part) => `${Number(part) & 255}` === part)) return host;
  try {
    const [found] = await Bun.dns.lookup(host, { family: 4, backend: "system" });
    if (!found) throw socketError("DNS_ENOTFOUND");
    return found.address;
  } catch (error) {
    throw explain(error, `cannot resolve ${repr(host)}`);
  }
}

/** The platform's words for its codes, and ours where it has none or they mean something else. */
const WORDS: Map<string, string> = new Map([
  ...getSystemErrorMap().values(),
  ["DNS_EAI_AGAIN", "temporary failure in name resolution"],
  ["DNS_EBADFAMILY", "address family for hostname not supported"],
  ["DNS_ENOTFOUND", "name or service not known"],
  ["EBADF", "the connection is closed"],
  ["ECONNABORTED", "the connection was cut off"],
  ["ECONNREFUSED", "connection refused or host unreachable"], // Bun has one code for both
  ["ETIMEDOUT", "timed out"],
]);

/** An error with an errno `code`, in words; `otherwise` is for a code that has none. */
function socketError(code: string, prefix = "", otherwise = code): Error {
  return Object.assign(new Error(prefix + (WORDS.get(code) ?? otherwise)), { code });
}

function explain(error: unknown, subject: string): Error {
  const { code = "", message } = error as NodeJS.ErrnoException;
  return socketError(code, `${subject}: `, message);
}

function inOneLine(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).replaceAll("\n", " ");
}

/** Shows bytes as Python 2's `repr` does: in printable ASCII, whatever the bytes. */
export function repr(bytes: string | Uint8Array): string {
  const text = Buffer.from(bytes).toString("latin1");
  const shown = text
    .replace(/[\\\t\n\r]/g, (char) => JSON.stringify(char).slice(1, -1))
    .replace(/[^ -~]/g, (char) => `\\x${char.charCodeAt(0).toString(16).padStart(2, "0")}`);
  if (!text.includes("'")) return `'${shown}'`;
  return text.includes('"') ? `'${shown.replaceAll("'", "\\'")}'` : `"${shown}"`;
}

if (import.meta.main) process.exit(await main(Bun.argv.slice(2)));
